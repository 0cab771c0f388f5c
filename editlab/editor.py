"""SequentialEditor: knowledge editing as Lightning training; one training step is one batch of edits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from editlab.data.fact import Fact, latest
from editlab.data.stream import FactBatch
from editlab.distributed import ranks
from editlab.edits.batch import StepState, carry_out, solve_again, solve_batch
from editlab.edits.edited_layer import ClosedFormOptimizer
from editlab.edits.edited_model import EditedModel
from editlab.edits.layer_search import find_layers
from editlab.edits.ledger import Ledger
from editlab.edits.plan import EditCallback, EditOutcome, EditPlan
from editlab.errors import UserError
from editlab.evaluation.evaluator import Evaluation, EvaluationSettings
from editlab.evaluation.score_cache import ScoreCache
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings, second_moments
from editlab.keys.subject_keys import KEY_MODES, Keys, read_keys, too_long
from editlab.lm.precision import default_dtype
from editlab.runs import resume
from editlab.runs.logger import RunLogger
from editlab.runs.summary import finish_run
from editlab.solver.closed_form import Preservation
from editlab.solver.device import require_setting
from editlab.solver.methods import EMMET, Method
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, not_negative, one_of
from editlab.values.cache import ValueCache
from editlab.values.optimize import ValueSettings, optimize_values

log = logging.getLogger(__name__)

_float32 = default_dtype(torch.float32)
"""With ``trainer.precision bf16-true`` Lightning makes bfloat16 the type of all new tensors in a step. It is meant for
the model alone: values, scores and solves stay as wide as they are everywhere else."""


class SequentialEditor(EditedModel):
    """Edits facts in a causal language model, one closed-form batch update a training step.

    Args:
        language_model: ``smollm2-135m`` (built in), a transformers hub id, or a folder.
        layers: blocks whose MLP output projection is edited; the target lives at the highest, and MEMIT's spreading
            shares it out over all of them, from the lowest up. ``auto`` finds them by trying
            (:mod:`editlab.edits.layer_search`).
        method: the closed form's metric and slack: ROME, MEMIT, EMMET or AlphaEdit.
        values: how targets v* are found.
        moments: the text of the second moments C0.
        contexts: prefixes in which values (and keys, where asked) are averaged.
        evaluation: what is measured beside the edits themselves.
        keys: ``bare`` (key in the bare prompt), ``mean`` (averaged over contexts) or ``each`` (one constraint a
            context).
        preserve_prompt_tokens: weight with which the keys of the edited prompts' other tokens enter the metric of
            their batch; the model reads those tokens too, so an edit should not move them. 0 leaves them out.
        passes: times that a batch goes through the layers, each time for what is left undone.
        edit_module: path of the edited module inside a block, where it is not found by structure.
        device_map: transformers' own (``auto``, or module path -> device), for a model that one device can not hold;
            the Trainer then does not move the model.
        restore_between_batches: edit each batch on the original weights: independent batches, no sequence.
        condition_limit: the Gram matrix' condition number above which the slack is raised (see the solver).
        solver_device: where the closed form is solved, in float64: ``cpu``, ``cuda:0``, or ``auto``, which is the
            model's device, or the CPU where that one has no float64, is slow at it, or lacks memory for the metrics.

    Raises:
        UserError: for layers, keys or weights that can not be.
    """

    def __init__(
        self,
        language_model: str = "smollm2-135m",
        layers: list[int] | Literal["auto"] = [4, 5, 6],  # noqa: B006 - shown as the default, and copied
        method: Method = EMMET(),  # noqa: B008 - frozen
        values: ValueSettings = ValueSettings(),  # noqa: B008 - read only
        moments: MomentSettings = MomentSettings(),  # noqa: B008
        contexts: ContextSettings = ContextSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        keys: str = "bare",
        preserve_prompt_tokens: float = 0.0,
        passes: int = 1,
        edit_module: str | None = None,
        device_map: str | dict[str, int | str] | None = None,
        restore_between_batches: bool = False,
        condition_limit: float = 1e10,
        solver_device: str = "auto",
    ) -> None:
        super().__init__(language_model, layers, edit_module, device_map)
        require_setting(solver_device)
        self.solver_setting = solver_device
        one_of("model", KEY_MODES, keys=keys)
        not_negative("model", preserve_prompt_tokens=preserve_prompt_tokens)
        if not condition_limit > 1:
            raise UserError(f"model.condition_limit is {condition_limit}: a condition number is above 1.")
        at_least_one("model", passes=passes)
        self.method = method
        self.values = values
        self.moments = moments
        self.context_settings = contexts
        self.key_mode = keys
        self.preserve_prompt_tokens = preserve_prompt_tokens
        self.passes = passes
        self.restore_between_batches = restore_between_batches
        self.condition_limit = condition_limit
        self.automatic_optimization = False
        self.preservation: dict[int, Preservation] = {}
        self.contexts: list[str] = []
        self.ledger = Ledger(restore_between_batches)
        self.resumed: dict[str, Any] | None = None
        self._value_cache: ValueCache | None = None
        self.evaluation = Evaluation(evaluation)

    # ---- setting up -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """The data module asks what does not fit into the model, whatever the verb."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            data.fault = self.too_long

    def too_long(self, fact: Fact) -> str | None:
        """What of a fact, as far as it is measured, the model can not take; as the end of a sentence."""
        measured = replace(fact, neighbors=fact.neighbors[: self.evaluation.settings.neighbors])
        return too_long(self.lm, measured, self.contexts)

    def configure_optimizers(self) -> ClosedFormOptimizer:
        """The optimizer whose step adds the solved updates; layers that nothing has named are found first."""
        if not self.layer_numbers:  # neither a setting nor a checkpoint, and the model is on its device by now
            self.edit_at(find_layers(self))
        return ClosedFormOptimizer(self.layers)

    @property
    def edits(self) -> int:
        """Facts that went through a step so far: the x-axis of every curve."""
        return len(self.ledger)

    @property
    def edited_facts(self) -> list[Fact]:
        """Facts that the weights should hold (not rolled back, not superseded), in the order of their edits."""
        return self.ledger.standing

    @cached_property
    def unedited_scores(self) -> ScoreCache:
        """What the unedited weights score, kept in the cache folder."""
        return self.evaluation.cache(self.lm, self.model_key)

    def on_fit_start(self) -> None:
        """Contexts, second moments, the facts to edit, and what the unedited model scores."""
        self.evaluation.start_clock()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        largest = self.method.largest_batch
        if largest is not None and data.batch_size > largest:
            raise UserError(
                f"{type(self.method).__name__} edits {largest} fact a step: set data.batch_size to {largest}."
            )
        with self.unedited():
            if not self.contexts:
                self.contexts = ranks.on_first(lambda: sample_contexts(self.lm, self.context_settings))
            device = self.solver_device
            found = second_moments(self.lm, self.layer_numbers, self.moments, self.language_model, device)
            for layer in self.layer_numbers:
                self.preservation[layer] = self.method.preservation(found.pop(layer), device)
            data.select(lambda facts: self.evaluation.known(self.lm, facts, self.unedited_scores))
            self.evaluation.measure_unedited(self.lm)
        resume.begin(self)

    def on_train_start(self) -> None:
        """All set-up is done: a resumed run's random generators take up their states."""
        resume.restore_rng(self)

    # ---- one batch of edits -----------------------------------------------------------------------------------

    @_float32
    def training_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Values, plan, solve, verdict, measurement: one batch of edits."""
        facts = latest(batch.facts)
        if self.restore_between_batches:
            for layer in self.layers:
                layer.restore(torch.zeros_like(layer.total))
        before = StepState(self.layers)
        plan = EditPlan(self.global_step, facts, self.find_values(facts))
        self._tell("on_edit_planned", plan)
        outcome = EditOutcome(plan, {}, {})
        self.optimizers().step(lambda: solve_batch(self, outcome))  # type: ignore[union-attr]
        self._tell("on_edit_applied", outcome)
        while outcome.needs_solving:
            solve_again(self, outcome, before)
            self._tell("on_edit_applied", outcome)
        carry_out(self, outcome, before)
        stayed = dict(zip((fact.slot for fact in facts), outcome.factors, strict=True))
        self.ledger.add(batch.facts, plan.step, [stayed[fact.slot] for fact in batch.facts])
        self._tell("on_edit_settled", outcome)
        self._tell("on_edit_adjust", outcome)
        self._tell("on_edit_done", outcome)
        self._log_step(batch.facts, outcome)

    def find_values(self, facts: Sequence[Fact]) -> Tensor:
        """Values v* of facts, float32 [n, d_v], on the weights that ``values.reference`` names.

        Those on the original weights do not depend on the run, so they are kept in the cache folder.
        """
        if self.values.reference == "current":
            return self.optimize_values(facts)
        with self.unedited():
            if self._value_cache is None:
                self._value_cache = ValueCache.of(self.lm, self.model_key, self.site, self.contexts, self.values)
            return self._value_cache.fetch(facts, self.optimize_values)

    def optimize_values(self, facts: Sequence[Fact]) -> Tensor:
        """Values v* of facts, float32 [n, d_v], found on the weights as they are."""
        with progress(total=len(facts), desc="Values", unit="fact") as bar:
            others = sum(metric.bytes for metric in self.preservation.values() if metric.device == self.lm.device)
            return optimize_values(
                self.lm, facts, self.site, self.contexts, self.values, progress=bar.update, others=others
            ).target

    def read_keys(self, facts: Sequence[Fact], layer: int) -> Keys:
        """Keys of facts at an edited layer with the weights as they are, and what their site gives now."""
        return read_keys(self.lm, facts, layer, self.site, self.contexts, self.key_mode, self.solver_device)

    def _tell(self, event: str, what: EditPlan | EditOutcome) -> None:
        listeners = [c for c in self.trainer.callbacks if isinstance(c, EditCallback)]  # type: ignore[attr-defined]
        for callback in sorted(listeners, key=lambda c: c.state_key):
            getattr(callback, event)(self.trainer, self, what)

    def _log_step(self, facts: Sequence[Fact], outcome: EditOutcome) -> None:
        with self.unedited():
            before = self.evaluation.update("before", self.lm, facts, self.unedited_scores)
        immediate = self.evaluation.update("immediate", self.lm, facts)
        rows = {f"before/{k}": v for k, v in before.items()} | {f"immediate/{k}": v for k, v in immediate.items()}
        rows |= {f"solve/{k}": v for k, v in outcome.diagnostics.items()}
        rows |= {
            f"weights/layer_{n}/delta_norm": layer.relative_norm()
            for n, layer in zip(self.layer_numbers, self.layers, strict=True)
        }
        rows |= {"edit/factor": outcome.factor, "edit/left_out": float(len(outcome.left_out))}
        rows |= {"edit/additions": float(len(outcome.plan.additions)), "edit/superseded": float(self.ledger.superseded)}
        rows |= outcome.measured
        # Not by self.log, whose rows reach the loggers after the step's checkpoint: a kill in between would lose them.
        for logger in self.trainer.loggers:
            logger.log_metrics(rows, step=self.edits)
        bar: dict[str, Any] = {n: immediate[n] for n in ("ES", "accuracy") if n in immediate}  # no ES without a truth
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=len(facts))

    # ---- the end, and the other verbs -------------------------------------------------------------------------

    def measure_retained(self) -> dict[str, float]:
        """ES, PS, NS and company of all edits that are in the weights, measured once for a state and logged.

        Independent batches are not in the weights together, so there nothing is retained and nothing measured.
        """
        if self.restore_between_batches:
            return {}
        return self.evaluation.measure_retained(self.lm, self.edited_facts, self.edits, self.trainer.loggers)

    def on_train_end(self) -> None:
        """All edits measured on the final weights, while the model is on its device and the ranks are together."""
        self.measure_retained()

    def on_fit_end(self) -> None:
        """The summary, on the screen and in the run's folder."""
        resume.end(self)
        self.measure_retained()  # of a finished run that was resumed
        finish_run(self.trainer, self)

    def on_validation_start(self) -> None:
        """Past edits are asked for anew."""
        self._look_at("retained")

    def on_test_start(self) -> None:
        """Bystanders are asked for anew."""
        self._look_at("bystanders")

    def _look_at(self, group: str) -> None:
        """What is measured of a checkpoint goes to its number of edits."""
        self.evaluation.begin(group)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.read_at(self.edits)

    @_float32
    def validation_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Retention: past edits on the weights as they are."""
        self.evaluation.update("retained", self.lm, batch.facts)

    def on_validation_epoch_end(self) -> None:
        """Logs ``retained/*`` over all batches."""
        self.log_dict({f"retained/{k}": v for k, v in self.evaluation.compute("retained").items()})

    @_float32
    def test_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Bystanders: facts that were never edited and should still be as true."""
        self.evaluation.update("bystanders", self.lm, batch.facts)

    def on_test_epoch_end(self) -> None:
        """Logs ``bystanders/*`` over all batches."""
        self.log_dict({f"bystanders/{k}": v for k, v in self.evaluation.compute("bystanders").items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what editing changed and not the language model."""
        resume.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what was kept; Lightning loads the updates."""
        resume.load(self, checkpoint)
