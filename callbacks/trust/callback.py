"""Edit trust: every batch of edits is scored by what it did, and kept, scaled down, cut or rolled back."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.trust.probes import NotFiniteError, Probes, sentences_of_facts, sentences_of_text
from callbacks.trust.score import FACT_SCALES, GAIN, HarmBudget, Threshold, TrustMetrics, TrustScorer
from editlab.distributed import ranks
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditCallback, EditOutcome, EditPlan
from editlab.errors import EditLabError, UserError
from editlab.lm.matmul import MATMULS
from editlab.lm.text import read_file
from editlab.runs.event_log import EventLog
from editlab.runs.summary import run_folder
from editlab.utils.validation import at_least_one, one_of

log = logging.getLogger(__name__)

EVENTS = "trust_events.jsonl"
ACTIONS = ("rollback", "scale", "search")
GRANULARITIES = ("batch", "edit")
FACT_SIGNALS = (GAIN, "certainty", *FACT_SCALES)
SEARCHED = (0.5, 0.25, 0.125)
"""Shares of the update that ``search`` tries, the largest first."""


@dataclass
class _Verdict:
    decision: str
    reason: str
    score: float | None
    metrics: TrustMetrics | None
    threshold: float
    factor: float = 1.0
    harm: float = 0.0
    """nats by which what stays of the batch makes held-out sentences less likely"""


class TrustRollback(EditCallback):
    """Scores each batch between the solve and the moment it counts, and acts on those that score low.

    The score is that of :class:`~callbacks.trust.score.TrustScorer`: gain minus penalties, 0 to 1. A batch under the
    threshold is rolled back bit for bit, or scaled down. What can not be measured is kept, and the event says so.

    Args:
        enable: False leaves every edit alone and measures nothing.
        threshold: score under which a batch is not kept as it is.
        weights: of the signals (:data:`~callbacks.trust.score.WEIGHTS` where not named).
        heldout_samples: true statements of facts that this run does not edit (or windows of ``heldout``).
        heldout: a text file in their place.
        neighbor_samples: neighbor statements asked for in each batch, one a fact; a fact's last neighbor is taken.
        granularity: ``batch``, or ``edit``: first the facts that score low are left out and the batch is solved again.
        action: what becomes of a batch under the threshold: ``rollback``; ``scale``: its update is scaled linearly
            from 1 at the threshold to 0 at half of it; ``search``: the largest of 1/2, 1/4, 1/8 of the update that
            scores high enough, if any does.
        calibrate: first batches from which the scales are taken, where ``scales`` does not give them; 0 keeps the
            built-in ones.
        scales: signal -> ``[free, half]``: a penalty is 0 up to ``free`` and 1/2 at ``free + half``.
        quantile: share of the last ``window`` scores under a moving threshold, which is never above ``threshold``.
        window: scores that the moving threshold looks back on.
        budget: ``[allowance, limit]`` in nats of held-out log-perplexity: harm that may go on in every batch, and how
            far a run may go beyond it; null sets no budget.
        attribution: also measure where the model's attention to the subject went; costs two backward passes a fact.
        matmul: how the probes multiply above the edited layers: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on
            CPUs with instructions for it, which halves the gate's time.

    Raises:
        UserError: for a setting out of range, an unknown signal or name.
    """

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
    ) -> None:
        where = "TrustRollback"
        one_of(where, GRANULARITIES, granularity=granularity)
        one_of(where, ACTIONS, action=action)
        one_of(where, MATMULS, matmul=matmul)
        at_least_one(where, heldout_samples=heldout_samples, neighbor_samples=neighbor_samples)
        if budget is not None and len(budget) != 2:
            raise UserError(f"TrustRollback.budget is {budget}: give [allowance, limit], or null.")
        self.enable = enable
        self.heldout_samples = heldout_samples
        self.heldout_path = heldout
        self.neighbor_samples = neighbor_samples
        self.granularity = granularity
        self.action = action
        self.matmul = matmul
        self.attribution = attribution or bool((weights or {}).get("attribution_focus_delta"))
        self.scorer = TrustScorer(weights, scales, calibrate)
        self.threshold = Threshold(threshold, quantile, window)
        self.budget = HarmBudget(*budget) if budget else None
        self.decisions: Counter[str] = Counter()
        self.probes: Probes | None = None
        self._singular: dict[int, Tensor] = {}
        self._unused = self.state_dict()

    # ---- setting up -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the run's events; a finished run that is gone on from comes to its end without a start."""
        assert isinstance(pl_module, SequentialEditor)
        self.begin_anew(pl_module, self._unused)
        self._events = EventLog(run_folder(trainer) / EVENTS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the held-out sentences, and drops events that a resumed run makes anew.

        Raises:
            UserError: where nothing is left to be held out.
        """
        if not self.enable:
            return
        assert isinstance(pl_module, SequentialEditor)
        if trainer.is_global_zero:
            self._events.go_on(trainer.global_step)
        lm, count = pl_module.lm, self.heldout_samples
        sentences = (
            sentences_of_text(lm, read_file(self.heldout_path), count)
            if self.heldout_path is not None
            else sentences_of_facts(lm, trainer.datamodule.spare_facts(count), count)  # type: ignore[attr-defined]
        )
        if not sentences:
            raise UserError(
                "TrustRollback finds no statement to hold out: name a text file in TrustRollback.heldout, or, in a "
                "run from a file of facts, lower data.limit or data.bystanders so that some are left over."
            )
        self.probes = Probes(sentences, self.neighbor_samples, self.attribution, self.matmul)
        self.probes.singular_vectors = dict(self._singular)

    # ---- the events of an edit --------------------------------------------------------------------------------

    def on_edit_planned(self, trainer: Trainer, editor: SequentialEditor, plan: EditPlan) -> None:
        """Asks the probes before the batch."""
        self._verdict: _Verdict | None = None
        self._fact_events: list[dict[str, Any]] = []
        self._error: str | None = None
        self._seconds = 0.0
        if self.probes is not None:
            self._try(self.probes.ask_before, editor, plan.facts)

    def on_edit_applied(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Asks them after it, and decides; comes a second time where facts were left out."""
        if self.probes is None or self._error is not None:
            return
        self._low: list[int] = []
        self._try(self._decide, self.probes, editor, outcome)
        if self._error is None:
            self._act(outcome)
        elif not outcome.left_out:
            self._fact_events = []  # what they say of facts left out did not come to pass

    def on_edit_settled(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """Writes down what was decided, and what it means for the batches to come."""
        if self.probes is None:
            return
        verdict = self._verdict or _Verdict("keep", f"not measured: {self._error}", None, None, self.threshold.value)
        self.decisions[verdict.decision] += 1
        if verdict.score is not None:
            self.threshold.note(verdict.score)
        if verdict.metrics is not None:
            self.scorer.observe(verdict.metrics)
        if self.budget:
            self.budget.spend(verdict.harm * outcome.factor / verdict.factor if verdict.factor else 0.0)
        if verdict.score is not None and outcome.factor == 1:  # else they are asked anew, or those of before
            self.probes.weights_stay()
        self._record(trainer, editor, outcome, verdict)

    def _try(self, what: Any, *arguments: Any) -> None:
        """A probe that fails must not cost the run: the edit is then kept, on all ranks, and the event says why.

        Raises:
            EditLabError: what is no probe's trouble, or ends all ranks.
        """
        start = time.perf_counter()
        failed = ""
        try:
            what(*arguments)
        except Exception as error:  # whatever it is, it is the gate's trouble and not the edit's
            if isinstance(error, EditLabError) or ranks.heard(error):
                raise  # the ranks may be at different places by now
            failed = f"{type(error).__name__}: {error}"
        # Where a rank can not tell, none acts: else some would keep a batch that others roll back.
        told = ranks.each([[rank] for rank in range(ranks.count())], lambda mine: [failed])
        failed = next((one for one in told if one), "")
        if failed:
            self._verdict, self._error = None, failed
            if self.probes is not None:
                self.probes.forget()
            log.warning("TrustRollback could not measure a batch, which is kept: %s", failed)
        self._seconds += time.perf_counter() - start

    # ---- deciding ---------------------------------------------------------------------------------------------

    def _decide(self, asked: Probes, editor: SequentialEditor, outcome: EditOutcome) -> None:
        """What should become of the batch; nothing of it changes yet."""
        try:
            if not all(bool(torch.isfinite(update).all()) for update in outcome.updates.values()):
                raise NotFiniteError("the update is not finite")
            metrics = asked.ask_after(editor, outcome)
        except NotFiniteError as broken:
            self._verdict = _Verdict("rollback", str(broken), 0.0, None, self.threshold.value, 0.0)
            return
        if self.granularity == "edit" and not outcome.left_out:
            self._cut(outcome, asked.of_facts(outcome))
            if self._low:
                return  # it comes again, solved without them; or all are gone
        self._verdict = self._judge(asked, editor, outcome, metrics)

    def _act(self, outcome: EditOutcome) -> None:
        if self._low:
            facts = len(outcome.plan.facts)
            reason = f"{len(self._low)} of {facts} facts score under {self.threshold.value:.2f}"
            outcome.leave_out(self._low, reason)
            if not outcome.kept:
                self._verdict = _Verdict("rollback", reason, 0.0, None, self.threshold.value, 0.0)
        elif self._verdict is not None and self._verdict.factor < 1:
            outcome.scale(self._verdict.factor, self._verdict.reason)

    def _cut(self, outcome: EditOutcome, signals: Sequence[TrustMetrics]) -> None:
        facts, threshold = outcome.plan.facts, self.threshold.value
        scores = [self.scorer.score_fact(metrics) for metrics in signals]
        self._fact_events = [
            {"fact": {"subject": fact.subject, "prompt": fact.prompt, "target_new": fact.target_new},
             "signals": {name: getattr(metrics, name) for name in FACT_SIGNALS}, "score": score,
             "threshold": threshold, "decision": "keep" if score >= threshold else "leave_out"}
            for fact, metrics, score in zip(facts, signals, scores, strict=True)
        ]  # fmt: skip
        self._low = [place for place, score in enumerate(scores) if score < threshold]

    def _judge(self, asked: Probes, editor: SequentialEditor, outcome: EditOutcome, metrics: TrustMetrics) -> _Verdict:
        score, threshold = self.scorer.score(metrics), self.threshold.value
        harm = math.log1p(metrics.heldout_ppl_delta)
        if self.budget and self.budget.refuses(harm):
            reason = f"harm {harm:.3f} while {self.budget.queue:.3f} is over the budget of {self.budget.limit}"
            return _Verdict("rollback", reason, score, metrics, threshold, 0.0)
        if score >= threshold:
            return _Verdict("keep", "", score, metrics, threshold, 1.0, harm)
        reason = f"score {score:.2f} is under {threshold:.2f} ({_culprit(self.scorer, metrics)})"
        factor = 0.0
        if self.action == "scale":
            factor = max(0.0, 2 * score / max(threshold, 1e-12) - 1)
            harm *= factor  # as if it grew evenly: measuring it would cost as much as the search does
        elif self.action == "search":
            factor, harm = self._search(asked, editor, outcome, threshold)
        return _Verdict("scale" if factor else "rollback", reason, score, metrics, threshold, factor, harm)

    def _search(
        self, asked: Probes, editor: SequentialEditor, outcome: EditOutcome, threshold: float
    ) -> tuple[float, float]:
        """The largest share that scores high enough, and its harm; (0, 0) where none does."""
        totals = [layer.total.clone() for layer in editor.layers]
        try:
            for factor in SEARCHED:
                for number, layer, total in zip(editor.layer_numbers, editor.layers, totals, strict=True):
                    layer.restore(total - (1 - factor) * outcome.updates[number])
                try:
                    metrics = asked.ask_after(editor, outcome)
                except NotFiniteError:
                    continue  # a smaller share may be
                metrics = replace(metrics, update_norm=factor * metrics.update_norm)
                if self.scorer.score(metrics) >= threshold:
                    return factor, math.log1p(metrics.heldout_ppl_delta)
            return 0.0, 0.0
        finally:
            for layer, total in zip(editor.layers, totals, strict=True):
                layer.restore(total)

    # ---- recording --------------------------------------------------------------------------------------------

    def _record(self, trainer: Trainer, editor: SequentialEditor, outcome: EditOutcome, verdict: _Verdict) -> None:
        batches = sum(self.decisions.values())
        numbers = {"factor": outcome.factor, "left_out": float(len(outcome.left_out)), "seconds": self._seconds}
        numbers |= {f"{name}_rate": self.decisions[name] / batches for name in ("rollback", "scale")}
        if verdict.score is not None:
            numbers |= {"score": verdict.score, "threshold": verdict.threshold}
        if verdict.metrics is not None:
            numbers |= asdict(verdict.metrics)
        if self.budget:
            numbers["budget_queue"] = self.budget.queue
        # Time differs from run to run, and the table does not: it goes into the events alone.
        outcome.measured.update({f"trust/{k}": v for k, v in numbers.items() if k != "seconds"})
        if not trainer.is_global_zero:
            return
        common = {"step": outcome.plan.step, "edits": editor.edits}
        for event in self._fact_events:
            self._events.append({**common, "kind": "fact", **event})
        self._events.append(
            {**common, "kind": "batch", "signals": asdict(verdict.metrics) if verdict.metrics else None,
             "score": verdict.score, "threshold": verdict.threshold, "decision": verdict.decision,
             "reason": verdict.reason, "factor": outcome.factor, "left_out": sorted(outcome.left_out),
             "budget_queue": self.budget.queue if self.budget else None, "seconds": round(self._seconds, 4)}
        )  # fmt: skip

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what was decided."""
        if self.enable and self.decisions:
            told = ", ".join(f"{count} {decision}" for decision, count in sorted(self.decisions.items()))
            log.info("Trust: %s (see %s)", told, self._events.path)

    def state_dict(self) -> dict[str, Any]:
        """What later decisions depend on."""
        return {
            "calibration": self.scorer.state_dict(),
            "scores": list(self.threshold.scores),
            "queue": self.budget.queue if self.budget else 0.0,
            "decisions": dict(self.decisions),
            "singular": dict(self.probes.singular_vectors) if self.probes else {},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.scorer.load_state_dict(state_dict["calibration"])
        self.threshold.scores.clear()
        self.threshold.scores.extend(state_dict["scores"])
        if self.budget:
            self.budget.queue = state_dict["queue"]
        self.decisions = Counter(state_dict["decisions"])
        self._singular = dict(state_dict["singular"])


def _culprit(scorer: TrustScorer, metrics: TrustMetrics) -> str:
    """The signal that costs a batch the most."""
    lost = {name: scorer.weights[name] * scorer.scales[name](getattr(metrics, name)) for name in scorer.scales}
    lost[GAIN] = scorer.weights[GAIN] * (1 - max(scorer.scales[GAIN](metrics.edit_success_gain), metrics.certainty))
    name = max(lost, key=lambda n: lost[n])
    return f"{name} {getattr(metrics, name):.3g}"
