"""Forgetting curves: how well past edits, and the model's language, hold as further edits are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread

from editlab.callback import EditCallback
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome
from editlab.evaluation.generation import fixed_sample
from editlab.metrics.names import (
    BEFORE,
    GENERATION_ENTROPY,
    IMMEDIATE,
    METRICS,
    PERPLEXITY,
    PERPLEXITY_START,
    RETAINED,
    TABLE_GROUPS,
    add_group,
)
from editlab.runs.figures import Series, forgetting_figure, perplexity_of_curve
from editlab.runs.logger import SCORES
from editlab.runs.summary import run_folder
from editlab.runs.watching import log_numbers
from editlab.utils.files import atomic_file
from editlab.utils.validation import at_least_one, not_negative

CURVES = ("ES", "accuracy", "generation", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy")
"""Metrics that get a chart of their own in TensorBoard, as far as the run measures them."""


START = PERPLEXITY_START.removeprefix(PERPLEXITY)
"""End of the name of the perplexity of a text's beginning, which is drawn into the chart of the perplexity."""


COHORT = "cohort"
"""Group of the metrics of a run's first edits."""


class ForgettingCurve(EditCallback):
    """Measures a fixed sample of all past edits and the model's language after every few edits.

    The sample is fixed: a fact's rank in it depends only on the fact and the seed, so from one point of the curve to
    the next a fact leaves the sample only if a new edit of a lower rank enters. At the end all edits are measured. The
    values are logged over the number of edits, together with those before each edit and right after it, and drawn as
    one figure, which is also saved as ``forgetting.png`` in the run's folder.

    Args:
        every_n_edits: number of edits between two points of the curve.
        sample: number of past edits measured at each point.
        seed: seed of the sample.
        cohort: also measure, as ``cohort/accuracy`` and so on, so many of the run's first facts at each point from the
            one at which all of them are edited: the same facts each time, so that nothing but forgetting moves this
            curve. Facts that were rolled back or edited again are left out. 0 measures none.

    Raises:
        UserError: if a count is under 1.
    """

    priority = 10
    measured_groups = (RETAINED,)

    def __init__(self, every_n_edits: int = 32, sample: int = 64, seed: int = 0, cohort: int = 0) -> None:
        at_least_one("ForgettingCurve", every_n_edits=every_n_edits, sample=sample)
        not_negative("ForgettingCurve", cohort=cohort)
        self.every_n_edits = every_n_edits
        self.sample = sample
        self.seed = seed
        self.cohort = cohort
        self.charts = {f"accuracy of the first {cohort} edits": [f"^{COHORT}/accuracy$"]} if cohort else {}
        self.curve: dict[int, dict[str, float]] = {}
        self._last = 0
        self._initial_state = self.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run in which the object was used."""
        assert isinstance(pl_module, SequentialEditor)
        self.reset_for_new_run(pl_module, self._initial_state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out TensorBoard's custom scalars: a chart for each metric that the run measures."""
        assert isinstance(pl_module, SequentialEditor)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                charts = {title: ["Multiline", tags] for title, tags in _charts(trainer, pl_module).items()}
                logger.experiment.add_custom_scalars({"forgetting": charts})

    def on_edit_done(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Measures a point of the curve if there were enough edits since the last one."""
        if editor.edits - self._last < self.every_n_edits:
            return
        self._last = editor.edits
        given = len(trainer.datamodule.facts)  # type: ignore[attr-defined]
        if editor.edits >= given and not editor.restore_between_batches:
            return  # the end measures all edits
        facts = self._sampled(editor.edited_facts)
        point = add_group(RETAINED, editor.evaluation.snapshot(editor.lm, facts)) | self._of_cohort(trainer, editor)
        self.curve[editor.edits] = point
        log_numbers(trainer, point, editor.edits)

    def _sampled(self, facts: list[Fact]) -> list[Fact]:
        """A fixed sample of the facts, in the order of their edits."""
        return [facts[index] for index in fixed_sample(facts, self.sample, self.seed)]

    def _of_cohort(self, trainer: Trainer, editor: SequentialEditor) -> dict[str, float]:
        """Metrics of the first facts, once all of them are edited."""
        if not self.cohort or editor.edits < self.cohort:
            return {}
        held = {fact.slot: fact for fact in editor.edited_facts}
        first = trainer.datamodule.facts[: self.cohort]  # type: ignore[attr-defined]
        standing = [fact for fact in first if held.get(fact.slot) == fact]
        return add_group(COHORT, editor.evaluation.measure(editor.lm, standing)) if standing else {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the cohort at the end of a run, while the model is still on its device."""
        assert isinstance(pl_module, SequentialEditor)
        if pl_module.edits >= len(trainer.datamodule.facts):  # type: ignore[attr-defined]
            self._finish_cohort(trainer, pl_module)

    def _finish_cohort(self, trainer: Trainer, editor: SequentialEditor) -> None:
        """Measures the last point of the cohort, if it was not: a resumed run that had finished never trains."""
        done = any(name.startswith(f"{COHORT}/") for name in self.curve.get(editor.edits, {}))
        if not done and (found := self._of_cohort(trainer, editor)):
            log_numbers(trainer, found, editor.edits)
            self.curve.setdefault(editor.edits, {}).update(found)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures all edits and draws the curves."""
        assert isinstance(pl_module, SequentialEditor)
        self._finish_cohort(trainer, pl_module)
        self.curve.setdefault(pl_module.edits, {}).update(pl_module.measure_retained())
        evaluation = pl_module.evaluation
        drawn = _merged(evaluation.series(BEFORE), evaluation.series(IMMEDIATE), self.curve)
        figure = forgetting_figure(drawn, perplexity_of_curve(evaluation.language_before, BEFORE))
        path = run_folder(trainer) / "forgetting.png"  # on all ranks, since the folder has to be agreed on
        if trainer.is_global_zero:
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)
            image = imread(path)  # the saved one, as drawing it again would take longer than a small model's edits
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image("forgetting", image, pl_module.edits, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"curve": dict(self.curve), "last": self._last}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a saved curve."""
        self.curve, self._last = dict(state_dict["curve"]), int(state_dict["last"])


def _charts(trainer: Trainer, editor: SequentialEditor) -> dict[str, list[str]]:
    """Title of each chart -> patterns of the names that it shows; no chart of what the run does not measure."""
    facts = trainer.datamodule.facts  # type: ignore[attr-defined]
    settings = editor.evaluation.settings
    truths = any(fact.target_true is not None for fact in facts)
    paraphrases = any(fact.paraphrases for fact in facts)
    neighbors = settings.neighbors != 0 and any(fact.neighbors for fact in facts)
    measured = {
        "ES": truths, "accuracy": True, "generation": bool(settings.generation),
        "PS": truths and paraphrases, "paraphrase_accuracy": paraphrases,
        "NS": neighbors, "neighbor_accuracy": neighbors,
        PERPLEXITY: settings.heldout_tokens > 0,
        GENERATION_ENTROPY: min(settings.heldout_tokens, settings.generated_texts) > 0,
    }  # fmt: skip
    titles = {metric.name: metric.title for metric in METRICS}
    # RunLogger names a metric alike in the runs of all groups; another TensorBoard logger has the groups in the names.
    groups = "|".join((SCORES, *TABLE_GROUPS))
    charts = {
        titles[name]: [f"^({groups})/{re.escape(name)}{f'({START})?' if name == PERPLEXITY else ''}$"]
        for name in (*CURVES, PERPLEXITY, GENERATION_ENTROPY)
        if measured[name]
    }
    charts["norm of the update"] = ["^weights/.*delta_norm$"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EditCallback):
            charts |= {title: list(tags) for title, tags in callback.charts.items()}
    return charts


def _merged(*several: Series) -> dict[int, dict[str, float]]:
    """Several curves as one, by the number of edits."""
    found: dict[int, dict[str, float]] = {}
    for curve in several:
        for edits, row in curve.items():
            found.setdefault(edits, {}).update(row)
    return found
