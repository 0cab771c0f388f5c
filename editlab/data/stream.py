"""The stream of fact batches, whose position is stored in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from editlab.data.fact import Fact


class FactBatch:
    """The facts of one step.

    It is not a list, tuple or dataclass, because Lightning rebuilds those to convert the tensors in them (for example
    with ``trainer.precision: bf16-true``), and facts are frozen.

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

    Lightning does not prefetch from an iterable that has a length, so the position is the number of batches that went
    through a training step.

    Args:
        facts: in the order of editing.
        batch_size: number of facts in a batch; the last batch may be smaller.
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
        """Return the position, which is the number of batches that were yielded."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position."""
        self.position = int(state["position"])
