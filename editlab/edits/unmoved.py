"""Noticing facts that a batch does not edit, because their values equal what the layer outputs already."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from editlab.edits.plan import EditOutcome

log = logging.getLogger(__name__)

LARGEST_TOLERANCE = 0.02
"""Largest relative difference that counts as none; for a wide dtype the tolerance is a few dozen roundings."""


class UnmovedFacts:
    """Counts the facts whose value did not move, and the batches whose update is zero, and says so."""

    def __init__(self) -> None:
        self.facts = 0
        self.of = 0

    def note(self, outcome: EditOutcome, dtype: torch.dtype) -> None:
        """Count a solved batch; a warning is logged for the first one with such facts.

        Args:
            outcome: the batch, after its solve.
            dtype: dtype of the model, which limits how well two outputs agree.
        """
        count = unmoved(outcome, dtype)
        facts = len(outcome.plan.facts)
        self.of += facts
        if count and not self.facts:
            log.warning("Batch %d: %s", outcome.plan.step, self._sentence(count, facts))
        self.facts += count

    def conclude(self) -> None:
        """Log the number of such facts in the whole run, if there are any."""
        if self.facts:
            log.warning("In all: %s", self._sentence(self.facts, self.of))

    def state_dict(self) -> dict[str, int]:
        """The counts so far, for a checkpoint."""
        return {"facts": self.facts, "of": self.of}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load what :meth:`state_dict` returned; nothing for checkpoints of older versions, which lack it."""
        self.facts, self.of = state.get("facts", 0), state.get("of", 0)

    def _sentence(self, count: int, facts: int) -> str:
        return (
            f"{count} of {facts} facts got no update, because their values equal what the layer outputs already: "
            "either their targets were likely before, or model.values.lr is too large or model.values.steps too small."
        )


def unmoved(outcome: EditOutcome, dtype: torch.dtype) -> int:
    """Return the number of a batch's facts that its solve does not change: all of them if the update is zero."""
    if outcome.updates and not any(bool(update.any()) for update in outcome.updates.values()):
        return len(outcome.plan.facts)
    if outcome.residual_norm is None:
        return 0
    size = outcome.plan.targets.first.norm(dim=1).to(outcome.residual_norm)
    tolerance = min(64 * torch.finfo(dtype).eps, LARGEST_TOLERANCE)
    return int((outcome.residual_norm <= tolerance * size).sum())
