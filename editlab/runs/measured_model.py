"""Measuring the model of a checkpoint: what the verbs ``validate`` and ``test`` do."""

from __future__ import annotations

import logging

import torch

from editlab.data.fact import Fact
from editlab.data.stream import FactBatch
from editlab.edits.edited_model import EditedModel
from editlab.edits.ledger import Ledger
from editlab.evaluation.evaluator import Evaluation
from editlab.lm.precision import default_dtype
from editlab.metrics.names import BYSTANDERS, RETAINED
from editlab.runs.run_table import RunTable
from editlab.runs.summary import save_outcomes
from editlab.utils import compat

log = logging.getLogger(__name__)

in_float32 = default_dtype(torch.float32)
"""Decorator of a step. With ``trainer.precision bf16-true`` Lightning creates all new tensors of a step in bfloat16.
That is meant for the model alone: values, scores and solves keep their full width."""


class MeasuredModel(EditedModel):
    """An edited model with a record of its edits, which ``validate`` and ``test`` measure."""

    ledger: Ledger
    """the edits"""

    evaluation: Evaluation
    """the measurements"""

    @property
    def edits(self) -> int:
        """Number of facts that went through a step so far: the x-axis of every curve."""
        return len(self.ledger)

    @property
    def edited_facts(self) -> list[Fact]:
        """Facts that the weights should hold (not rolled back, not superseded), in the order of their edits."""
        return self.ledger.standing

    def on_validation_start(self) -> None:
        """Clears earlier measurements of past edits, and logs which facts are evaluated."""
        self._begin(RETAINED)
        log.info("Evaluating the checkpoint's %d edits again; data.path is not used", len(self.edited_facts))

    def on_test_start(self) -> None:
        """Clears earlier measurements of bystanders."""
        self._begin(BYSTANDERS)

    def _begin(self, group: str) -> None:
        """Starts a measurement of a checkpoint, whose numbers are logged at its number of edits."""
        self.evaluation.begin(group)
        compat.log_measurements_at(self.trainer, self.edits)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunTable):
                logger.read_at(self.edits)

    @in_float32
    def validation_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Measures past edits on the weights as they are (retention)."""
        self.evaluation.update(RETAINED, self.lm, batch.facts)

    def on_validation_epoch_end(self) -> None:
        """Logs ``retained/*`` over all batches, and writes the outcome of each edit."""
        self.log_dict(self.evaluation.compute(RETAINED))
        save_outcomes(self.trainer, self.ledger, self.evaluation)

    @in_float32
    def test_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Measures bystanders: facts that were never edited and should not change."""
        self.evaluation.update(BYSTANDERS, self.lm, batch.facts)

    def on_test_epoch_end(self) -> None:
        """Logs ``bystanders/*`` over all batches."""
        self.log_dict(self.evaluation.compute(BYSTANDERS))
