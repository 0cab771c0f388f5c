"""The ledger: what became of each fact that went through a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from editlab.data.fact import Fact


@dataclass
class LedgerEntry:
    """What became of one fact."""

    fact: Fact
    batch: int
    """number of the batch that edited it, from 0"""
    factor: float
    """share of its edit that stayed: 1 kept, 0 rolled back or left out"""

    @property
    def kept(self) -> bool:
        """Whether the edit went into the weights."""
        return self.factor > 0


class Ledger:
    """All edits in the order in which they were made.

    A later kept edit of the same subject and prompt *supersedes* an earlier one: the user changed their mind, and the
    earlier fact is no longer one that should be retained.
    """

    def __init__(self) -> None:
        self._entries: list[LedgerEntry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self._entries)

    def add(self, facts: Sequence[Fact], batch: int, factors: Sequence[float]) -> None:
        """Enters the facts of a batch and what stayed of each fact's edit."""
        self._entries += [LedgerEntry(fact, batch, factor) for fact, factor in zip(facts, factors, strict=True)]

    @property
    def standing(self) -> list[Fact]:
        """Facts that the weights should hold: kept, and not superseded; in the order in which they were edited."""
        return [self._entries[i].fact for i in sorted(self._latest.values())]

    @property
    def kept(self) -> int:
        """Edits that were kept, the superseded ones too."""
        return sum(entry.kept for entry in self._entries)

    @property
    def superseded(self) -> int:
        """Kept edits whose place a later one took."""
        return self.kept - len(self.standing)

    @property
    def fates(self) -> list[str]:
        """What became of each edit, in words; a later one that superseded it is named by its number, from 1."""
        latest = self._latest
        return [self._fate(i, latest.get(entry.fact.slot, i)) for i, entry in enumerate(self._entries)]

    @property
    def _latest(self) -> dict[tuple[str, str], int]:
        return {entry.fact.slot: i for i, entry in enumerate(self._entries) if entry.kept}

    def _fate(self, index: int, latest: int) -> str:
        entry = self._entries[index]
        if not entry.kept:
            return "rolled back"
        if latest > index:
            return f"superseded by edit {latest + 1}"
        return "kept" if entry.factor == 1 else f"scaled to {entry.factor:.2g}"

    def state_dict(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return [{"fact": e.fact.to_dict(), "batch": e.batch, "factor": e.factor} for e in self]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self._entries = [LedgerEntry(Fact.from_dict(e["fact"]), e["batch"], e["factor"]) for e in state]
