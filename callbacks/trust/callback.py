"""Edit trust: every batch of edits is scored by its effects, and kept, scaled, reduced or rolled back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.trust.budget import PerplexityBudget
from callbacks.trust.firm import firmness
from callbacks.trust.learned import LearnedScorer
from callbacks.trust.probes import Probes, Sentence, measure_heldout, sentences_of_facts, sentences_of_text
from callbacks.trust.score import HarmBudget, Threshold, TrustScorer
from callbacks.trust.verdict import ACTIONS, FIRM, GRANULARITIES, Judge, Verdict
from editlab.callback import EditCallback
from editlab.distributed import ranks
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.snapshot import Snapshot
from editlab.errors import EditLabError, UserError
from editlab.evaluation.language import BUILTIN_TEXT
from editlab.lm.matmul import MATMULS, products_above
from editlab.lm.text import read_file
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder
from editlab.utils.validation import at_least_one, one_of

log = logging.getLogger(__name__)

EVENTS = "trust_events.jsonl"
SCORES = ("hand", "learned")
BUILTIN = "builtin"
"""Name of the built-in text as held-out text."""


class TrustRollback(EditCallback):
    """Scores each batch after its solve, and scales it or rolls it back if the score is low.

    The score is that of :class:`~callbacks.trust.score.TrustScorer`: gain minus penalties, 0 to 1. A batch under the
    threshold is rolled back bit for bit, scaled down, or solved again so that its update is held back. A batch that
    cannot be measured is kept, and its event says so.

    Args:
        enable: False keeps every edit and measures nothing.
        threshold: score under which a batch is not kept whole.
        weights: weights of the signals; default: :data:`~callbacks.trust.score.WEIGHTS`.
        score: ``hand``: the weighted gain minus the weighted penalties; ``learned``: a logistic regression on the
            signals, fitted on batches whose harm is known (:mod:`callbacks.trust.learned`).
        heldout_samples: number of true statements of facts that this run does not edit (or of windows of ``heldout``).
        heldout: a text file to use in place of such statements, or ``builtin``: the end of the built-in text.
        neighbor_samples: neighbor statements measured in each batch, one for each fact: its last neighbor.
        granularity: ``batch``, or ``edit``: first the facts that score low are dropped and the batch is solved again.
        action: what is done with a batch under the threshold or over a budget: ``rollback``; ``scale``: its update is
            scaled linearly from 1 at the threshold to 0 at half of it; ``search``: the largest of 1/2, 1/4, 1/8 of the
            update to which nothing objects; ``firm``: the least firm solve to which nothing objects
            (:mod:`callbacks.trust.firm`). If there is none, a rollback.
        calibrate: number of first batches from which those scales are computed that ``scales`` does not give; 0 keeps
            the built-in ones.
        scales: signal -> ``[free, half]``: a penalty is 0 up to ``free`` and 1/2 at ``free + half``.
        quantile: fraction of the last ``window`` scores that lie under a moving threshold, which is never above
            ``threshold``; null keeps it fixed.
        window: number of scores that the moving threshold is computed from.
        budget: ``[allowance, limit]`` in nats of held-out log-perplexity: the harm that every batch may do, and how
            far a run may exceed it in total; null sets no budget.
        perplexity_budget: largest perplexity on the held-out text after all edits of the run, over that of the unedited
            model: 1.1 is 10% more. The batches get equal parts of it by their number of edits
            (:class:`~callbacks.trust.budget.PerplexityBudget`), and ``budget`` is not used. If ``heldout`` is not given
            it is ``builtin``. Default: none.
        attribution: also measure how much attribution the subject's last token loses; two backward passes for each
            fact.
        matmul: how the probes multiply above the edited layers: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on
            CPUs with instructions for it, which halves the gate's time.

    Raises:
        UserError: A setting is out of range, a signal or name is unknown, or ``score: learned`` is combined with what
            it has no fit for: single facts, or weights.
    """

    priority = 50

    def __init__(
        self,
        enable: bool = True,
        threshold: float = 0.5,
        weights: dict[str, float] | None = None,
        heldout_samples: int = 32,
        heldout: str | None = None,
        neighbor_samples: int = 16,
        granularity: str = "batch",
        action: str = "rollback",
        calibrate: int = 4,
        scales: dict[str, list[float]] | None = None,
        quantile: float | None = None,
        window: int = 20,
        budget: list[float] | None = [0.03, 0.1],  # noqa: B006 - jsonargparse shows it as the default; only read
        attribution: bool = False,
        matmul: str = "auto",
        score: str = "hand",
        perplexity_budget: float | None = None,
    ) -> None:
        where = "TrustRollback"
        one_of(where, GRANULARITIES, granularity=granularity)
        one_of(where, ACTIONS, action=action)
        one_of(where, MATMULS, matmul=matmul)
        one_of(where, SCORES, score=score)
        if score == "learned" and granularity != "batch":
            raise UserError(
                "TrustRollback.score is learned, which was fitted on whole batches: set granularity: batch, or "
                "score: hand."
            )
        if score == "learned" and weights:
            raise UserError("TrustRollback.weights are those of score: hand: remove them, or set score: hand.")
        at_least_one(where, heldout_samples=heldout_samples, neighbor_samples=neighbor_samples)
        if budget is not None and len(budget) != 2:
            raise UserError(f"TrustRollback.budget is {budget}: give [allowance, limit], or null.")
        self.enable = enable
        self.heldout_samples = heldout_samples
        self.heldout_path = BUILTIN if heldout is None and perplexity_budget is not None else heldout
        self.neighbor_samples = neighbor_samples
        self.matmul = matmul
        self.attribution = attribution or bool((weights or {}).get("attribution_focus_delta"))
        self.scorer = (
            LearnedScorer(scales=scales, calibrate=calibrate)
            if score == "learned"
            else TrustScorer(weights, scales, calibrate)
        )
        self.threshold = Threshold(threshold, quantile, window)
        self.perplexity = None if perplexity_budget is None else PerplexityBudget(perplexity_budget)
        self.budget = HarmBudget(*budget) if budget and not self.perplexity else None
        self.judge = Judge(self.scorer, self.threshold, self.budget, granularity, action, perplexity=self.perplexity)
        self.decisions: Counter[str] = Counter()
        self.probes: Probes | None = None
        self._singular: dict[int, Tensor] = {}
        self._initial_state = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the event log. It is done here because a resumed run that was finished never starts its training."""
        assert isinstance(pl_module, SequentialEditor)
        self.require_settings(pl_module)
        self.reset_for_new_run(pl_module, self._initial_state)
        self._events = EventLog(run_folder(trainer) / EVENTS)

    def require_settings(self, editor: SequentialEditor) -> None:
        """Checks the settings against the editor's.

        Raises:
            UserError: The method changes no weights, or batches are independent, so that a run has no perplexity.
        """
        editor.method.require_changed_weights("TrustRollback", "it judges changes of weights")
        if self.enable and self.judge.action == FIRM:
            editor.method.require_closed_form("TrustRollback.action firm", "it holds back the closed form's solve")
        if self.enable and self.perplexity and editor.restore_between_batches:
            raise UserError(
                "TrustRollback.perplexity_budget is for the edits of a sequence, and model.restore_between_batches "
                "removes each batch before the next: remove one of the two."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the held-out sentences, and removes events after the checkpoint, which a resumed run writes again.

        Raises:
            UserError: There is nothing to hold out, or facts cannot be dropped one by one.
        """
        if not self.enable:
            return
        assert isinstance(pl_module, SequentialEditor)
        if self.judge.granularity == "edit" and not pl_module.targets.source.repeatable:
            raise UserError(
                "TrustRollback.granularity edit drops single facts of a batch, and with model.values.source gradient "
                "each has already changed the targets of the others: set granularity to batch."
            )
        if trainer.is_global_zero:
            self._events.resume(trainer.global_step)
        sentences = self._sentences(trainer, pl_module)
        if not sentences:
            raise UserError(
                "TrustRollback finds no statement to hold out: name a text file in TrustRollback.heldout, or, in a "
                "run from a file of facts, lower data.limit or data.bystanders so that some facts remain."
            )
        self.probes = Probes(sentences, self.neighbor_samples, self.attribution, self.matmul)
        self.probes.singular_vectors = dict(self._singular)
        if self.perplexity:
            self.perplexity.edits = len(trainer.datamodule.facts)  # type: ignore[attr-defined]
            if self.perplexity.unedited is None:
                with pl_module.unedited(), products_above(pl_module.lm, pl_module.layer_numbers[-1], self.matmul):
                    self.perplexity.unedited = measure_heldout(pl_module.lm, sentences).nll

    def _sentences(self, trainer: Trainer, editor: SequentialEditor) -> list[Sentence]:
        lm, count = editor.lm, self.heldout_samples
        if self.heldout_path is None:
            return sentences_of_facts(lm, trainer.datamodule.spare_facts(count), count)  # type: ignore[attr-defined]
        builtin = self.heldout_path == BUILTIN
        text = read_file(str(BUILTIN_TEXT) if builtin else self.heldout_path)
        return sentences_of_text(lm, text, count, last=builtin)

    # ---- the events of an edit --------------------------------------------------------------------------------

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Measures the model before the batch, which is first solved as firmly as the last one had to be."""
        self._verdict: Verdict | None = None
        self.judge.fact_events = []
        self._error: str | None = None
        self._seconds = 0.0
        if self.probes is not None:
            if self.judge.action == FIRM:
                plan.firmness = firmness(self.judge.level)
                self.judge.before = Snapshot(editor.layers)
            self._try(self.probes.measure_before, editor, plan.facts)

    def on_edit_applied(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Measures the model after the batch, and decides; called a second time if facts were dropped."""
        if self.probes is None or self._error is not None:
            return
        self._verdict = self._try(self.judge.decide, self.probes, editor, outcome)
        if self._verdict is None:
            if not outcome.dropped:
                self.judge.fact_events = []  # the batch is kept whole, so no fact is dropped
        elif self._verdict.low:
            outcome.drop(self._verdict.low, self._verdict.reason)
        elif self._verdict.factor < 1:
            outcome.scale(self._verdict.factor, self._verdict.reason)

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Records the verdict and updates threshold, scales and budget for the batches to come."""
        if self.probes is None:
            return
        verdict = self._verdict or Verdict(f"not measured: {self._error}", None, None, self.threshold.value)
        self.decisions[verdict.decision] += 1
        if verdict.score is not None:
            self.threshold.note(verdict.score)
        if verdict.metrics is not None:
            self.scorer.observe(verdict.metrics)
        if self.budget:
            self.budget.spend(verdict.harm * outcome.factor)
        self.judge.before = None
        if verdict.score is not None and outcome.factor == 1:  # else the weights are not those last measured
            self.probes.reuse_heldout()
        self._record(trainer, editor, outcome, verdict)

    def _try(self, probe: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a probe; if it fails on any rank, the batch is kept on all ranks and its event gives the error.

        Returns:
            What the probe returned; None if it failed.

        Raises:
            EditLabError: The failure is not the probe's, or ends all ranks.
        """
        start = time.perf_counter()
        failed, result = "", None
        try:
            result = probe(*arguments)
        except Exception as error:  # whatever it is, a failing probe must not end the run
            if isinstance(error, EditLabError) or ranks.reached_all(error):
                raise  # the ranks may be in different calls by now
            failed = f"{type(error).__name__}: {error}"
        # If one rank cannot measure, none acts: else some would keep a batch that others roll back.
        errors = ranks.each([[rank] for rank in range(ranks.count())], lambda mine: [failed])
        failed = next((error for error in errors if error), "")
        if failed:
            self._error, result = failed, None
            if self.probes is not None:
                self.probes.clear()
            log.warning("TrustRollback could not measure a batch, which is kept: %s", failed)
        self._seconds += time.perf_counter() - start
        return result

    # ---- recording --------------------------------------------------------------------------------------------

    def _record(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome, verdict: Verdict) -> None:
        batches = sum(self.decisions.values())
        numbers = {"factor": outcome.factor, "dropped": float(len(outcome.dropped)), "seconds": self._seconds}
        numbers |= {f"{name}_rate": self.decisions[name] / batches for name in ("rollback", "scale")}
        if self.judge.action == FIRM:
            numbers |= {"firm_rate": self.decisions["firm"] / batches, "firmness": outcome.plan.firmness}
        if self.perplexity and verdict.score is not None:
            numbers["room"] = self.judge.room
        if verdict.score is not None:
            numbers |= {"score": verdict.score, "threshold": verdict.threshold}
        if verdict.metrics is not None:
            numbers |= asdict(verdict.metrics)
        if self.budget:
            numbers["budget_queue"] = self.budget.queue
        # Times differ from run to run, which the table must not: they go into the events alone.
        outcome.measured.update({f"trust/{k}": v for k, v in numbers.items() if k != "seconds"})
        if not trainer.is_global_zero:
            return
        common = {"step": outcome.plan.step, "edits": editor.edits}
        for event in self.judge.fact_events:
            self._events.append({**common, "kind": "fact", **event})
        self._events.append(
            {**common, "kind": "batch", "signals": asdict(verdict.metrics) if verdict.metrics else None,
             "score": verdict.score, "threshold": verdict.threshold, "decision": verdict.decision,
             "reason": verdict.reason, "factor": outcome.factor, "dropped": sorted(outcome.dropped),
             "firmness": outcome.plan.firmness, "room": numbers.get("room"),
             "budget_queue": self.budget.queue if self.budget else None, "seconds": round(self._seconds, 4)}
        )  # fmt: skip

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs how many batches were kept, scaled and rolled back."""
        if self.enable and self.decisions:
            counts = ", ".join(f"{count} {decision}" for decision, count in sorted(self.decisions.items()))
            log.info("Trust: %s (see %s)", counts, self._events.path)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on."""
        return {
            "calibration": self.scorer.state_dict(),
            "scores": list(self.threshold.scores),
            "queue": self.budget.queue if self.budget else 0.0,
            "level": self.judge.level,
            "perplexity": self.perplexity.state_dict() if self.perplexity else {},
            "decisions": dict(self.decisions),
            "singular": dict(self.probes.singular_vectors) if self.probes else {},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.scorer.load_state_dict(state_dict["calibration"])
        self.threshold.scores.clear()
        self.threshold.scores.extend(state_dict["scores"])
        if self.budget:
            self.budget.queue = state_dict["queue"]
        self.judge.level = state_dict.get("level", 0)
        if self.perplexity and state_dict.get("perplexity"):
            self.perplexity.load_state_dict(state_dict["perplexity"])
        self.decisions = Counter(state_dict["decisions"])
        self._singular = dict(state_dict["singular"])
