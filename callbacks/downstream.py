"""Curves of downstream tasks: what editing does to tasks that have nothing to do with the edited facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from editlab.callback import EditCallback
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome
from editlab.errors import UserError
from editlab.evaluation.downstream import Downstream
from editlab.utils.validation import at_least_one


class DownstreamEval(EditCallback):
    """Runs tasks of lm-evaluation-harness on the unedited model, after every few edits, and at the end.

    The metrics are logged as ``downstream/TASK/METRIC`` over the number of edits. The harness is an extra
    (``pip install 'editlab[lm-eval]'``). Measuring changes neither weights nor random draws, so the edits are the same
    with and without it.

    Args:
        tasks: names of tasks, such as ``mmlu``, and paths of YAML files of tasks.
        every_n_edits: number of edits between two points of the curve.
        limit: number of documents of each task, the first ones; default: all.
        batch_size: number of prompts that are run together.

    Raises:
        UserError: if no task is given, or a count is under 1.
    """

    priority = 20
    """after the forgetting curve, which measures the same weights"""

    charts: Mapping[str, Sequence[str]] = {"downstream tasks": ("^downstream/.*$",)}

    def __init__(
        self, tasks: list[str], every_n_edits: int = 100, limit: int | None = None, batch_size: int = 8
    ) -> None:
        at_least_one("DownstreamEval", every_n_edits=every_n_edits, limit=limit, batch_size=batch_size)
        if not tasks:
            raise UserError("DownstreamEval.tasks is empty: name at least one task, such as hellaswag.")
        self.tasks = list(tasks)
        self.every_n_edits = every_n_edits
        self.limit = limit
        self.batch_size = batch_size
        self.curve: dict[int, dict[str, float]] = {}
        self._downstream: Downstream | None = None
        self._initial_state = self.state_dict()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the tasks, so that a wrong name or a missing file ends the run before its first edit."""
        if stage == "fit":
            self._downstream = Downstream(self.tasks, self.limit, self.batch_size)
            self._downstream.load()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run in which the object was used."""
        assert isinstance(pl_module, SequentialEditor)
        self.require_settings(pl_module)
        self.reset_for_new_run(pl_module, self._initial_state)

    def require_settings(self, editor: SequentialEditor) -> None:
        """Checks that the editor's method changes the weights, which are what the tasks measure."""
        editor.method.require_changed_weights("DownstreamEval", "its tasks measure the weights")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the unedited model."""
        assert isinstance(pl_module, SequentialEditor)
        if not pl_module.edits:
            self._measure(trainer, pl_module)

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Measures a point of the curve if there were enough edits since the last one."""
        if editor.edits - max(self.curve, default=0) >= self.every_n_edits:
            self._measure(trainer, editor)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the final weights, while the model is on its device."""
        assert isinstance(pl_module, SequentialEditor)
        self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the final weights of a finished run that was resumed, whose training did not start."""
        assert isinstance(pl_module, SequentialEditor)
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, editor: SequentialEditor) -> None:
        """Measures and logs a point, once for a number of edits."""
        if editor.edits in self.curve:
            return
        assert self._downstream is not None
        found = self._downstream.scores(editor.lm)
        point = {
            f"downstream/{task}/{metric}": score.value for task, row in found.items() for metric, score in row.items()
        }
        self.curve[editor.edits] = point
        for logger in trainer.loggers:
            logger.log_metrics(point, step=editor.edits)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"curve": dict(self.curve)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a saved curve."""
        self.curve = dict(state_dict["curve"])
