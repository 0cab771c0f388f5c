"""The perplexity that a whole run may cost, divided among its edits."""

from __future__ import annotations

import math
from typing import Any

from editlab.errors import UserError

HEAD_START = 0.1
"""Fraction of the budget that is there before the first edit, since the harm of single batches varies."""


class PerplexityBudget:
    """Keeps the perplexity of held-out sentences within ``ratio`` times that of the unedited model.

    After n of N edits the log-perplexity may have risen by ``ln(ratio) (h + (1 - h) n / N)`` nats, with h the
    :data:`HEAD_START`. The rise is measured against the unedited model and not added up, so what a batch did not use
    remains for later ones, and errors do not accumulate.

    Args:
        ratio: largest perplexity after the last edit, over that of the unedited model.

    Raises:
        UserError: The ratio is not a finite number above 1.
    """

    def __init__(self, ratio: float) -> None:
        if not 1 < ratio < math.inf:
            raise UserError(
                f"TrustRollback.perplexity_budget is {ratio}: give the largest perplexity after the run's edits, over "
                "that of the unedited model, such as 1.1."
            )
        self.nats = math.log(ratio)
        self.edits = 1
        """number of edits of the run, N"""
        self.unedited: float | None = None
        """mean negative log-probability per token of the held-out sentences on the unedited model"""

    def risen(self, nll: float) -> float:
        """The rise since the unedited model, in nats, where the sentences now have this negative log-probability."""
        assert self.unedited is not None
        return nll - self.unedited

    def room(self, nll: float, edits: int) -> float:
        """The rise in nats that a batch may cause, at least 0.

        Args:
            nll: mean negative log-probability of the held-out sentences before the batch.
            edits: number of the run's edits with those of the batch.
        """
        part = HEAD_START + (1 - HEAD_START) * min(1.0, edits / self.edits)
        return max(0.0, self.nats * part - self.risen(nll))

    def state_dict(self) -> dict[str, Any]:
        """The measurement on the unedited model; the number of edits is the run's."""
        return {"unedited": self.unedited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.unedited = state["unedited"]
