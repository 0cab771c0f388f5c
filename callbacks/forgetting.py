"""Forgetting curves: retention of past edits and held-out perplexity over the number of edits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome
from editlab.runs.figures import forgetting_figure
from editlab.runs.summary import run_folder
from editlab.utils.files import atomic_file
from editlab.utils.validation import at_least_one

CURVES = ("ES", "accuracy", "PS", "NS")


class ForgettingCurve(EditCallback):
    """Measures a sample of all past edits and the held-out perplexity after every so many edits.

    A fact's rank in the sample depends on the fact and the seed alone, so from one point of the curve to the next the
    sample changes only by new edits of a lower rank. At the end all edits are measured. The curves are logged over the
    number of edits, next to the values before and right after each edit, and drawn as one figure, which is also saved
    as ``forgetting.png`` in the run's folder.

    Args:
        every_n_edits: number of edits between two points of the curve.
        sample: number of past edits measured at each point.
        seed: seed of the sample.

    Raises:
        UserError: A count is under 1.
    """

    priority = 10

    def __init__(self, every_n_edits: int = 32, sample: int = 64, seed: int = 0) -> None:
        at_least_one("ForgettingCurve", every_n_edits=every_n_edits, sample=sample)
        self.every_n_edits = every_n_edits
        self.sample = sample
        self.seed = seed
        self.curve: dict[int, dict[str, float]] = {}
        self._last = 0
        self._initial_state = self.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets up TensorBoard's custom scalars: one chart for each metric, with its curves of all groups."""
        assert isinstance(pl_module, SequentialEditor)
        self.reset_for_new_run(pl_module, self._initial_state)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                groups = ("before", "immediate", "retained")
                charts: dict[str, list[Any]] = {
                    name: ["Multiline", [f"^{group}/{name}$" for group in groups]] for name in CURVES
                }
                charts["held-out perplexity"] = ["Multiline", ["^perplexity/heldout$"]]
                charts["generation entropy"] = ["Multiline", ["^generation/entropy$"]]
                charts["edits around an adjustment"] = ["Multiline", ["^lora/accuracy_(before|after)$"]]
                charts["norm of the update"] = ["Multiline", ["^weights/.*delta_norm$"]]
                logger.experiment.add_custom_scalars({"forgetting": charts})

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Measures a point of the curve if enough edits were made since the last one."""
        if editor.edits - self._last < self.every_n_edits:
            return
        self._last = editor.edits
        facts = self._sampled(editor.edited_facts)
        point = {f"retained/{k}": v for k, v in editor.evaluation.measure(editor.lm, facts).items()} if facts else {}
        point |= editor.evaluation.language(editor.lm)
        self.curve[editor.edits] = point
        for logger in trainer.loggers:
            logger.log_metrics(point, step=editor.edits)

    def _sampled(self, facts: list[Fact]) -> list[Fact]:
        """The facts with the lowest hashes, in the order of their edits."""
        ranks = {id(f): hashlib.sha256(f"{self.seed}\0{f.subject}\0{f.prompt}".encode()).digest() for f in facts}
        chosen = set(sorted(ranks, key=lambda i: ranks[i])[: self.sample])
        return [fact for fact in facts if id(fact) in chosen]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures all edits, and draws the curves."""
        assert isinstance(pl_module, SequentialEditor)
        retained = {f"retained/{k}": v for k, v in pl_module.measure_retained().items()}
        self.curve.setdefault(pl_module.edits, {}).update(retained | pl_module.evaluation.language_after)
        figure = forgetting_figure(
            self.curve,
            pl_module.evaluation.series("before"),
            pl_module.evaluation.series("immediate"),
            pl_module.evaluation.language_before.get("perplexity/heldout"),
        )
        folder = run_folder(trainer)  # collective: every rank has to call it
        if trainer.is_global_zero:
            with atomic_file(folder / "forgetting.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("forgetting", figure, global_step=pl_module.edits)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"curve": dict(self.curve), "last": self._last}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.curve, self._last = dict(state_dict["curve"]), int(state_dict["last"])
