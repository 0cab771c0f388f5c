"""The stream of batches, which knows how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from editlab.data.fact import Fact


class FactBatch:
    """The facts of one step.

    No list, tuple or dataclass, for those Lightning takes apart to convert the tensors in them (``trainer.precision``
    ``bf16-true`` and company), and facts are frozen.

    Args:
        facts: in the order of editing.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = list(facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)


class EditStream:
    """A sized iterable over batches of facts, whose position Lightning saves and restores.

    Lightning fetches nothing ahead of an iterable that has a length, so the position is that of the batches that
    have gone through a training step.

    Args:
        facts: in the order of editing.
        batch_size: facts a batch; the last may be smaller.
    """

    def __init__(self, facts: Sequence[Fact], batch_size: int) -> None:
        self.facts = facts
        self.batch_size = batch_size
        self.position = 0

    def __len__(self) -> int:
        return -(-len(self.facts) // self.batch_size)

    def __iter__(self) -> Iterator[FactBatch]:
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            yield FactBatch(self.facts[start : start + self.batch_size])
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, in batches handed out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position."""
        self.position = int(state["position"])
