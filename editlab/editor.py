"""SequentialEditor: knowledge editing as Lightning training; one training step is one batch of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal

import torch

from editlab.data.chat import as_evaluated
from editlab.data.fact import Fact, latest
from editlab.data.stream import FactBatch
from editlab.distributed import ranks
from editlab.edits.batch import BatchSolver
from editlab.edits.carried import Carried
from editlab.edits.conventions import OWN, Conventions
from editlab.edits.edited_layer import ClosedFormOptimizer
from editlab.edits.layer_search import FACTS, SearchSetup, choose_layers
from editlab.edits.ledger import Ledger
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.requirements import require_batch_size, require_compatible
from editlab.edits.snapshot import Snapshot
from editlab.edits.solve_settings import SolveSettings
from editlab.edits.trained_batch import solver_of
from editlab.edits.unmoved import UnmovedFacts
from editlab.evaluation.evaluator import Evaluation, EvaluationSettings
from editlab.evaluation.known import holds_truth
from editlab.evaluation.retrieval import memory_of
from editlab.evaluation.score_cache import ScoreCache
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings
from editlab.keys.subject_keys import Site, too_long
from editlab.runs import resume
from editlab.runs.measured_model import MeasuredModel, in_float32
from editlab.runs.step_metrics import step_metrics
from editlab.runs.summary import finish_run, summarize
from editlab.runs.watching import log_numbers, require_logged, require_watchable
from editlab.runs.workplace import enter_folder, leave_folder
from editlab.solver.base import EditMethod
from editlab.solver.methods import EMMET
from editlab.solver.post_steps import PostStep
from editlab.utils.machine import restore_threads
from editlab.utils.rng import set_rng_state
from editlab.values.settings import ValueSettings
from editlab.values.sources import make_source, require_combination
from editlab.values.spread import Targets, distinct, sites_of
from editlab.values.targets import TargetFinder


class SequentialEditor(MeasuredModel):
    """Edits facts in a causal language model; each training step is one update for a batch of facts.

    Args:
        language_model: ``smollm2-135m`` (built in), a transformers hub id, or a folder.
        layers: blocks whose MLP output projection is edited; ``values.spread`` says how they share an edit (default:
            as MEMIT does). ``auto`` chooses them by trying (:mod:`editlab.edits.layer_search`).
        method: metric and slack of the closed form: ROME, MEMIT, EMMET, AlphaEdit, BetaEdit or UltraEdit; or a control
            without one: FineTune, LoRAOnly or Retrieval, for which ``values``, ``moments`` and ``contexts`` have no
            effect.
        values: how the values v* are found.
        moments: the text that the second moments C0 are computed from.
        contexts: prefixes in which values (and, depending on ``keys``, keys) are averaged.
        evaluation: what is measured in addition to the edits.
        keys: ``bare`` (key in the bare prompt), ``mean`` (averaged over contexts) or ``templates`` (the bare prompt
            weighs 1/2, the contexts share the rest); default: as ``conventions`` says.
        preserve_prompt_tokens: weight of the keys of the edited prompts' context tokens in the batch's metric; 0: off.
        passes: number of times that a batch goes through the layers, each time for the remaining residual.
        edit_module: path of the edited module inside a block; default: found by structure.
        device_map: transformers' own, for a model that one device cannot hold; the Trainer then does not move it.
        restore_between_batches: edit each batch on the original weights: independent batches, no sequence.
        condition_limit: condition number of the Gram matrix above which the slack is raised (see the solver).
        chat_template: what reads prompts as a user's turn: ``none``, ``edit`` (keys, values), ``evaluate`` or ``both``.
        solver_device: device on which the closed form is solved, in float64: ``cpu``, ``cuda:0``, or ``auto``: the
            model's, or the CPU if that one has no float64, computes it slowly, or lacks memory for the metrics.
        conventions: ``own``, or ``published``: those of the method's published code for ``keys``, ``site`` and
            ``values.kl_at``. Each of these settings, if given, holds whatever the conventions say
            (:mod:`editlab.edits.conventions`).
        site: whether a target is a state of the residual ``stream`` after the block, or the output of the ``mlp``;
            default: as ``conventions`` says, and never the stream if a norm follows the MLP.
        post_steps: what is done with each layer's update before it is added: SPHERE, REVIVE, PRUNE, RECT, in order.
        compensate: carry what post-steps cut off from an update into the next solve, and what a scaling by trust cut
            off while a consolidated memory holds the batch's keys.
        made_for: entries of the model's configuration that the settings were chosen for; other models are refused.

    Raises:
        UserError: The layers, keys or weights are not valid.
    """

    solver: BatchSolver
    """solves the batches; set when the fit starts"""
    targets: TargetFinder
    """finds the values v*; set when the fit starts"""

    def __init__(
        self,
        language_model: str = "smollm2-135m",
        layers: list[int] | Literal["auto"] = [4, 5, 6],  # noqa: B006 - shown as the default, and copied
        method: EditMethod = EMMET(),  # noqa: B008 - frozen
        values: ValueSettings = ValueSettings(),  # noqa: B008 - read only
        moments: MomentSettings = MomentSettings(),  # noqa: B008
        contexts: ContextSettings = ContextSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        keys: str | None = None,
        preserve_prompt_tokens: float = 0.0,
        passes: int = 1,
        edit_module: str | None = None,
        device_map: str | dict[str, int | str] | None = None,
        restore_between_batches: bool = False,
        condition_limit: float = 1e10,
        chat_template: str = "none",
        solver_device: str = "auto",
        conventions: str = OWN,
        site: str | None = None,
        post_steps: list[PostStep] = [],  # noqa: B006 - shown as the default, and copied
        compensate: bool = True,
        made_for: dict[str, int | str] | None = None,
    ) -> None:
        super().__init__(language_model, layers, edit_module, device_map, chat_template, made_for)
        settled = Conventions.of(conventions, method, keys, site, values.kl_at)
        self.solve_settings = SolveSettings(
            method, settled.keys, preserve_prompt_tokens, passes, condition_limit, solver_device, settled.site,
            settled.bare_denominator, post_steps=tuple(post_steps), compensate=compensate,
        )  # fmt: skip
        require_combination(values, method, not self.layer_numbers, restore_between_batches)
        self.site_setting = settled.site
        self.values, self.moments, self.context_settings = replace(values, kl_at=settled.kl_at), moments, contexts
        self.restore_between_batches = restore_between_batches
        self.automatic_optimization = False
        self.contexts: list[str] = []
        self.ledger = Ledger(restore_between_batches)
        self.carried = Carried()
        self.unmoved = UnmovedFacts()
        self.resumed: dict[str, Any] | None = None
        self.evaluation = Evaluation(evaluation)
        self.evaluation.memory = memory_of(self.method, lambda: self.ledger.standing)
        self.metric_groups = self.evaluation.collections  # a submodule: Lightning moves the metrics' states

    # ---- setting up -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Locks the run's folder, and gives the data module the check whether a fact fits into the model."""
        enter_folder(self.trainer, stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            data.fault = self.too_long

    def teardown(self, stage: str) -> None:
        """Unlocks the run's folder."""
        leave_folder(self.trainer)

    def too_long(self, fact: Fact) -> str | None:
        """Why a fact does not fit into the model (:func:`~editlab.keys.subject_keys.too_long`); None if it does."""
        measured = replace(fact, neighbors=fact.neighbors[: self.evaluation.settings.neighbors])
        (scored,) = as_evaluated([measured], self.lm.chat)
        return too_long(self.lm, measured, self.contexts) or too_long(self.lm, scored, [""])

    def configure_optimizers(self) -> ClosedFormOptimizer:
        """The optimizer whose step runs the solve; with ``layers: auto`` the layers are chosen first."""
        if not self.layer_numbers:  # neither a setting nor a checkpoint, and the model is on its device by now
            self.method.require_closed_form("model.layers auto", "it compares layers by edits of the closed form")
            self.edit_at(self.find_layers(self.trainer.datamodule.facts_to_try(2 * FACTS)))  # type: ignore[attr-defined]
        return ClosedFormOptimizer(self.layers)

    def find_layers(self, facts: Sequence[Fact]) -> list[int]:
        """The layers at which editing these facts works best (:func:`~editlab.edits.layer_search.choose_layers`)."""
        setup = SearchSetup(self.lm, self.language_model, self.model_key, self.solve_settings, self.values,
                            self.moments, self.context_settings)  # fmt: skip
        return choose_layers(setup, facts)

    @property
    def method(self) -> EditMethod:
        """The editing method."""
        return self.solve_settings.method

    @property
    def sites(self) -> list[Site]:
        """The sites that values are found at, from the lowest up: those that the solver works towards."""
        return distinct(self._site_of_layers())

    def _site_of_layers(self) -> dict[int, Site]:
        return sites_of(self.lm, self.layer_numbers, self.values.spread, self.site_setting)

    @cached_property
    def unedited_scores(self) -> ScoreCache:
        """Scores of the unedited weights, kept in the cache folder."""
        return self.evaluation.cache(self.lm, self.model_key)

    def on_fit_start(self) -> None:
        """Prepares the solver, selects the facts to edit, and measures the unedited model."""
        self.evaluation.start_clock()
        require_watchable(callbacks := self.trainer.callbacks)  # type: ignore[attr-defined]
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        require_batch_size(self.method, data.batch_size)
        require_compatible(self.solve_settings, self.restore_between_batches, callbacks, bool(self.lm.anatomy.joint))
        with self.unedited():
            self.prepare_solver()
            with self.evaluation.products(self.lm):
                data.select(lambda facts: holds_truth(self.lm, facts, data.keep, self.unedited_scores))
            asked = [] if self.restore_between_batches else data.facts  # independent edits are never asked together
            others = data.other_facts(self.evaluation.settings.bystanders if asked else 0)
            self.evaluation.measure_unedited(self.lm, asked, others, self.unedited_scores)
        if self.resumed is not None:
            resume.RunIdentity.of(self.resumed).require_settings(self.identity)
            resume.require_facts(self.ledger, data.facts, data.path)
        resume.prepare_folder(self.trainer, self.resumed["table"] if self.resumed else {}, self.edits)

    def prepare_solver(self) -> None:
        """Makes solver and value source; for the closed form also contexts (if no checkpoint gave them) and C0."""
        with self.unedited():
            if not self.contexts and self.method.solves:
                self.contexts = ranks.on_first(lambda: sample_contexts(self.lm, self.context_settings))
            self.solver = solver_of(self.method)(
                self.lm,
                self.solve_settings,
                self._site_of_layers(),
                self.layers_by_number,
                self.contexts,
                carried=self.carried,
            )
            if self.method.solves:
                self.solver.read_moments(self.moments, self.language_model)
        source = make_source(
            self.lm, self.model_key, self.contexts, self.values, self.unedited,
            reserved=lambda: self.solver.metric_bytes(self.lm.device),
            first=lambda count: self.trainer.datamodule.facts[:count],  # type: ignore[attr-defined]
        )  # fmt: skip
        if self.resumed is not None:
            source.load_state_dict(self.resumed.get("values", {}))
        self.targets = TargetFinder(self.lm, self.values, source, self.sites, self.unedited)

    def on_train_start(self) -> None:
        """Sets a resumed run's random generators to the checkpoint's states, now that the set-up draws no more."""
        if self.resumed is not None:
            set_rng_state(self.resumed["rng"])

    # ---- one batch of edits -----------------------------------------------------------------------------------

    @in_float32
    def training_step(self, batch: FactBatch, batch_idx: int) -> None:
        """Edits one batch: values, plan, solve, verdict, measurement."""
        facts = latest(batch.facts)
        if self.restore_between_batches:
            for layer in self.layers:
                layer.restore(torch.zeros_like(layer.total))
        before, source_before = Snapshot(self.layers), self.targets.source.state_dict()
        targets = self.targets.find(facts) if self.method.solves else Targets.none(facts)
        plan = EditPlan(self.global_step, facts, targets)
        self._notify("on_edit_planned", plan)
        outcome = EditOutcome(plan)
        self.optimizers().step(lambda: self.solver.solve(outcome))  # type: ignore[union-attr]
        self.unmoved.note(outcome, self.lm.model.dtype)
        self._notify("on_edit_applied", outcome)
        while outcome.needs_solving:
            self.solver.solve_without_dropped(outcome, before)
            self._notify("on_edit_applied", outcome)
        self.solver.apply_verdict(outcome, before)
        if not outcome.kept:
            self.targets.source.load_state_dict(source_before)
        factors = dict(zip((fact.slot for fact in facts), outcome.factors, strict=True))
        self.ledger.add(batch.facts, plan.step, [factors[fact.slot] for fact in batch.facts])
        for event in ("on_edit_settled", "on_edit_adjust", "on_edit_done"):
            self._notify(event, outcome)
        self._log_step(batch.facts, outcome)

    def _notify(self, event: str, subject: EditPlan | EditOutcome) -> None:
        """Calls this hook of :class:`~editlab.callback.EditCallback` on all callbacks that have it, by priority."""
        listeners = [c for c in self.trainer.callbacks if hasattr(c, event)]  # type: ignore[attr-defined]
        for callback in sorted(listeners, key=lambda c: (getattr(c, "priority", 0), c.state_key)):
            getattr(callback, event)(self.trainer, self, subject)

    def _log_step(self, facts: Sequence[Fact], outcome: EditOutcome) -> None:
        with self.unedited():
            before = self.evaluation.update("before", self.lm, facts, self.unedited_scores)
        immediate = self.evaluation.update("immediate", self.lm, facts)
        rows = before | immediate | step_metrics(outcome, self.layers_by_number, self.ledger.superseded)
        # Not by self.log, whose rows reach the loggers after the step's checkpoint: a kill in between would lose them.
        log_numbers(self.trainer, rows, self.edits)
        require_logged(self.trainer)
        # Facts without a truth have no ES.
        bar: Any = {name: immediate[name] for name in ("immediate/ES", "immediate/accuracy") if name in immediate}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=len(facts))

    # ---- the end ----------------------------------------------------------------------------------------------

    def measure_retained(self) -> dict[str, float]:
        """ES, PS, NS, S and accuracies of all edits that are in the weights, measured once for a state and logged.

        Independent batches are never in the weights together, so for them nothing is measured.
        """
        if self.restore_between_batches:
            return {}
        return self.evaluation.measure_retained(self.lm, self.edited_facts, self.edits, self.trainer.loggers)

    def on_train_end(self) -> None:
        """Measures all edits on the final weights, while the model is on its device and all ranks are running."""
        self.measure_retained()

    def on_fit_end(self) -> None:
        """Logs the summary and writes it and the outcome of each edit into the run's folder."""
        if self.resumed is not None:
            resume.require_unfinished(self.trainer, self.resumed, self.edits)
        self.measure_retained()  # for a finished run that was resumed: its training did not start
        title = f"{self.language_model}, layers {', '.join(map(str, self.layer_numbers))}, {type(self.method).__name__}"
        finish_run(self.trainer, self.summarize(), title, self.ledger, self.evaluation)
        self.unmoved.conclude()

    def summarize(self) -> dict[str, Any]:
        """The run as a dict, for ``summary.json``; numbers that were not measured are absent."""
        return summarize(self.trainer, self.ledger, self.layers_by_number, self.evaluation)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    @property
    def identity(self) -> resume.RunIdentity:
        """The properties that must agree for a run to resume from a checkpoint of this one."""
        used = Conventions(
            self.values.kl_position, self.solve_settings.key_mode, self.site.name, self.solve_settings.bare_denominator
        )
        return replace(resume.RunIdentity.of_run(self, self.trainer), conventions=asdict(used))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves what editing changed, without the language model."""
        state = {
            "modules": [self.lm.anatomy.edit_name(layer) for layer in self.layer_numbers],
            "adapted": sum(layer.adapter is not None for layer in self.changed_layers),
            "independent": self.restore_between_batches,
            "method": type(self.method).__name__,
            "changes_weights": self.method.changes_weights,
            "ledger": self.ledger.state_dict(),
            "carried": self.carried.state_dict(),
            "unmoved": self.unmoved.state_dict(),
            "contexts": self.contexts,
            "evaluation": self.evaluation.state_dict(),
            "values": self.targets.source.state_dict(),
        }
        resume.save(checkpoint, self.trainer, self.identity, state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the state; Lightning loads the sums of updates, and :meth:`on_train_start` the random states."""
        saved = checkpoint[resume.KEY]
        restore_threads(saved.get("threads"))
        if not self.layer_numbers:  # ``auto``: the run that wrote the checkpoint has chosen them
            self.edit_at(saved["layers"])
        resume.RunIdentity.of(saved).require_model(self.identity)
        resume.require_sums(checkpoint["state_dict"], self.layers_by_number)
        for path in filter(None, map(resume.adjusted_path, checkpoint["state_dict"])):
            self.changed_layer(path)  # the layer has to exist before Lightning loads its sum
        self.ledger.load_state_dict(saved["ledger"])
        self.carried.load_state_dict(saved.get("carried", {}))
        self.unmoved.load_state_dict(saved.get("unmoved", {}))
        self.contexts = list(saved["contexts"])
        self.evaluation.load_state_dict(saved["evaluation"])
        self.resumed = saved
