"""What was cut off from updates and is carried into the next solve (:mod:`editlab.solver.compensation`)."""

from __future__ import annotations

from torch import Tensor

from editlab.edits.plan import EditOutcome


class Carried:
    """For each layer the part of earlier updates that is not in the weights, as the next batch finds it."""

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}
        """layer -> float32 [d_v, d_k]; a layer without an entry carries nothing"""

    def settle(self, outcome: EditOutcome) -> None:
        """Takes over what post-steps cut off from a batch, whose solve made up for what was carried until then.

        Of a batch that is scaled by f, the fraction f counts as made: f of what it cut off, and 1 - f of what was
        carried before. A batch that is rolled back changes nothing.
        """
        factor = outcome.factor
        if factor == 0:
            return
        parts = {number: factor * cut for number, cut in outcome.cut.items()}
        if factor < 1:
            for number, before in self.parts.items():
                rest = (1 - factor) * before
                parts[number] = parts[number] + rest.to(parts[number]) if number in parts else rest
        self.parts = parts

    def complete(self, outcome: EditOutcome) -> None:
        """Carries also the part of a scaled update that is not in the weights, so that later solves complete it.

        To be called after :meth:`settle`, by a memory that preserves the batch's keys: otherwise it would preserve
        outputs that got only a fraction of their edit.
        """
        self.parts = {number: (1 - outcome.factor) * update for number, update in outcome.updates.items()}
        for number, cut in outcome.cut.items():
            self.parts[number] = self.parts[number].to(cut) + cut

    def state_dict(self) -> dict[int, Tensor]:
        """Layer -> its part, on the CPU."""
        return {number: part.cpu() for number, part in self.parts.items()}

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.parts = dict(state)
