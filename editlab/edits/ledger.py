"""The ledger: each fact that went through a step, with the fraction of its edit that stayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editlab.data.fact import Fact


@dataclass
class LedgerEntry:
    """One fact that went through a step."""

    fact: Fact
    batch: int
    """number of the batch that edited it, from 0"""
    factor: float
    """fraction of its edit that stayed: 1 kept, 0 rolled back or dropped"""

    @property
    def kept(self) -> bool:
        """Whether the edit went into the weights."""
        return self.factor > 0


class Ledger:
    """All edits in the order in which they were made.

    A later kept edit of the same subject and prompt *supersedes* an earlier one, and the earlier fact is no longer one
    that should be retained. If one batch has several edits of a subject and prompt, only the last goes into the
    weights: it supersedes the others if it is kept, and they are rolled back with it otherwise.

    Args:
        independent: each batch is edited on the original weights, so only the last batch is in them.
    """

    def __init__(self, independent: bool = False) -> None:
        self.independent = independent
        self._entries: list[LedgerEntry] = []

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Ledger:
        """The ledger in an editor's entry of a checkpoint (:mod:`editlab.runs.resume`)."""
        ledger = cls(saved.get("independent", False))
        ledger.load_state_dict(saved["ledger"])
        return ledger

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self._entries)

    def add(self, facts: Sequence[Fact], batch: int, factors: Sequence[float]) -> None:
        """Adds the facts of a batch and the fraction of each fact's edit that stayed."""
        self._entries += [LedgerEntry(fact, batch, factor) for fact, factor in zip(facts, factors, strict=True)]

    @property
    def standing(self) -> list[Fact]:
        """Facts that the weights should hold: kept, not superseded, not removed; in the order of their edits."""
        return [self._entries[i].fact for i in self.standing_numbers]

    @property
    def standing_numbers(self) -> list[int]:
        """Numbers, from 0, of the entries whose facts are :attr:`standing`."""
        return sorted(self._latest.values())

    @property
    def kept(self) -> int:
        """Number of edits that were kept, including superseded ones."""
        return sum(entry.kept for entry in self._entries)

    @property
    def superseded(self) -> int:
        """Number of kept edits that a later one superseded."""
        latest = self._latest
        present = [i for i, entry in enumerate(self._entries) if entry.kept and not self._removed(entry)]
        return sum(latest[self._entries[i].fact.slot] > i for i in present)

    @property
    def fates(self) -> list[str]:
        """The fate of each edit in words; a later edit that superseded it is named by its number, from 1."""
        latest = self._latest
        return [self._fate(i, latest.get(entry.fact.slot, i)) for i, entry in enumerate(self._entries)]

    @property
    def _latest(self) -> dict[tuple[str, str], int]:
        return {e.fact.slot: i for i, e in enumerate(self._entries) if e.kept and not self._removed(e)}

    def _removed(self, entry: LedgerEntry) -> bool:
        return self.independent and entry.batch < self._entries[-1].batch

    def _fate(self, index: int, latest: int) -> str:
        entry = self._entries[index]
        if not entry.kept:
            return "rolled back"
        if self._removed(entry):
            return "taken out before the next batch"
        if latest > index:
            return f"superseded by edit {latest + 1}"
        return "kept" if entry.factor == 1 else f"scaled to {entry.factor:.2g}"

    def state_dict(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return [{"fact": e.fact.to_dict(), "batch": e.batch, "factor": e.factor} for e in self]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Loads the entries that :meth:`state_dict` returned."""
        self._entries = [LedgerEntry(Fact.from_dict(e["fact"]), e["batch"], e["factor"]) for e in state]
