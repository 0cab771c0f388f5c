"""The verdict on a batch of edits: its score against the threshold, its harm against the budget, its worst facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from callbacks.trust.budget import PerplexityBudget
from callbacks.trust.firm import Finding, firmness, least_firm
from callbacks.trust.probes import Measured, Probes
from callbacks.trust.score import FACT_SCALES, GAIN, HarmBudget, Threshold, TrustMetrics, TrustScorer
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome
from editlab.edits.snapshot import Snapshot

FIRM = "firm"
ACTIONS = ("rollback", "scale", "search", FIRM)
GRANULARITIES = ("batch", "edit")
FACT_SIGNALS = (GAIN, "certainty", *FACT_SCALES)
FACTORS = (0.5, 0.25, 0.125)
"""Fractions of the update that ``search`` tries, the largest first."""


@dataclass(frozen=True)
class Verdict:
    """The decision of trust on a batch. The outcome's factor is the lowest that any callback requests."""

    reason: str
    """why not all of the update should stay; "" if it should"""
    score: float | None
    """trust in the batch, 0 to 1; None if it was not measured"""
    metrics: TrustMetrics | None
    """signals of the batch; None if they were not measured"""
    threshold: float
    """the score that was required"""
    factor: float = 1.0
    """fraction of the update that should stay"""
    harm: float = 0.0
    """nats by which the whole update makes held-out sentences less likely; a fraction of it is taken to do that
    fraction of the harm"""
    low: tuple[int, ...] = ()
    """indices in the batch of facts to drop; the batch is solved again and judged once more"""
    firmness: float = 0.0
    """how much the update in the weights is held back"""

    @property
    def decision(self) -> str:
        """``keep``, ``firm``, ``scale`` or ``rollback``."""
        if self.factor == 1:
            return "firm" if self.firmness else "keep"
        return "scale" if self.factor else "rollback"


@dataclass
class Judge:
    """Decides which fraction of a batch's update stays, and which of its facts are dropped."""

    scorer: TrustScorer
    threshold: Threshold
    budget: HarmBudget | None
    granularity: str
    """``batch``, or ``edit``: facts that score low are dropped first"""
    action: str
    """action on a batch under the threshold or over the perplexity budget: ``rollback``, ``scale``, ``search`` or
    ``firm``"""
    perplexity: PerplexityBudget | None = None
    """the perplexity that the whole run may cost"""
    level: int = 0
    """level of firmness at which the next batch is solved first (:func:`~callbacks.trust.firm.firmness`)"""
    before: Snapshot | None = None
    """the state before the present batch, from which firmer updates are solved"""
    room: float = math.inf
    """nats of held-out log-perplexity that the present batch may cost"""
    fact_events: list[dict[str, Any]] = field(default_factory=list)
    """one event for each fact, if the facts of the present batch were scored; cleared before each batch"""

    def decide(self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome) -> Verdict:
        """The verdict on a batch whose update is in the weights; the outcome does not change."""
        threshold = self.threshold.value
        if self.perplexity:
            self.room = self.perplexity.room(probes.nll, editor.edits + len(outcome.plan.facts))
        if not all(bool(torch.isfinite(update).all()) for update in outcome.updates.values()):
            return Verdict("the update is not finite", 0.0, None, threshold, 0.0)
        metrics = probes.measure_after(editor, outcome)
        if metrics is None:
            return Verdict("the model's log-probabilities are not finite after the batch", 0.0, None, threshold, 0.0)
        if self.granularity == "edit" and not outcome.dropped:
            low = self._low_facts(outcome, probes.measure_facts(outcome))
            if low:
                facts = len(outcome.plan.facts)
                reason = f"{len(low)} of {facts} facts score under {threshold:.2f}"
                if len(low) == facts:
                    return Verdict(reason, 0.0, None, threshold, 0.0, low=low)
                return Verdict(reason, None, None, threshold, low=low)
        return self._judge(probes, editor, outcome, metrics)

    def _low_facts(self, outcome: EditOutcome, signals: Sequence[TrustMetrics]) -> tuple[int, ...]:
        """Indices in the batch of the facts that score under the threshold; notes an event for every fact."""
        facts, threshold = outcome.plan.facts, self.threshold.value
        scores = [self.scorer.score_fact(metrics) for metrics in signals]
        self.fact_events = [
            {"fact": {"subject": fact.subject, "prompt": fact.prompt, "target_new": fact.target_new},
             "signals": {name: getattr(metrics, name) for name in FACT_SIGNALS}, "score": score,
             "threshold": threshold, "decision": "keep" if score >= threshold else "drop"}
            for fact, metrics, score in zip(facts, signals, scores, strict=True)
        ]  # fmt: skip
        return tuple(index for index, score in enumerate(scores) if score < threshold)

    def _judge(self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome, metrics: TrustMetrics) -> Verdict:
        """The verdict on a whole batch by its signals."""
        if self.action == FIRM:
            return self._firm(probes, editor, outcome, metrics)
        score, threshold, reason = self.scorer.score(metrics), self.threshold.value, self._objection(metrics)
        harm = math.log1p(metrics.heldout_ppl_delta)
        factor = 0.0 if reason else 1.0
        if self.budget and self.budget.refuses(harm):
            pass  # rolled back, whatever the action
        elif reason and self.action == "scale":
            factor = min(1.0, max(0.0, 2 * score / max(threshold, 1e-12) - 1), self.room / max(harm, 1e-12))
        elif reason and self.action == "search":
            factor, harm = self._search(probes, editor, outcome)
        return Verdict(reason, score, metrics, threshold, factor, harm)

    def _objection(self, metrics: TrustMetrics) -> str:
        """Why the update should not stay as it is; "" if nothing speaks against it."""
        harm, score, threshold = math.log1p(metrics.heldout_ppl_delta), self.scorer.score(metrics), self.threshold.value
        if self.budget and self.budget.refuses(harm):
            return f"harm {harm:.3f} while {self.budget.queue:.3f} is over the budget of {self.budget.limit}"
        if harm > self.room:
            return f"harm {harm:.4f} is over the {self.room:.4f} nats that the perplexity budget leaves"
        if score < threshold:
            signal = self.scorer.costliest(metrics)
            return f"score {score:.2f} is under {threshold:.2f} ({signal} {getattr(metrics, signal):.3g})"
        return ""

    def _firm(self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome, metrics: TrustMetrics) -> Verdict:
        """The verdict with the least firm update to which nothing objects, which is then in the weights.

        Without such an update the batch is rolled back, and the next one starts at the level that this one did.
        """
        assert self.before is not None
        before, start, first = self.before, self.level, self._objection(metrics)
        tried: dict[int, tuple[TrustMetrics, Measured | None]] = {start: (metrics, probes.latest)}
        reason = first

        def measure(level: int) -> Finding:
            nonlocal reason
            if level not in tried:
                editor.solver.solve_again(outcome, before, firmness(level))
                found = probes.measure_after(editor, outcome)
                if found is None:
                    return Finding.TOO_LOOSE
                tried[level] = found, probes.latest
            found = tried[level][0]
            objection = self._objection(found)
            reason = objection or reason
            if not objection:
                return Finding.GOOD
            return Finding.TOO_FIRM if self.scorer.ceiling(found) < self.threshold.value else Finding.TOO_LOOSE

        try:
            best = least_firm(start, measure)
        except Exception:  # the batch is kept as it was solved first
            editor.solver.solve_again(outcome, before, firmness(start))
            raise
        if best is None:
            harm = math.log1p(metrics.heldout_ppl_delta)
            return Verdict(first, self.scorer.score(metrics), metrics, self.threshold.value, 0.0, harm)
        if outcome.plan.firmness != firmness(best):  # a looser one was tried after it
            editor.solver.solve_again(outcome, before, firmness(best))
        metrics, probes.latest = tried[best]
        self.level = best
        score, harm = self.scorer.score(metrics), math.log1p(metrics.heldout_ppl_delta)
        reason = reason if best else ""
        return Verdict(reason, score, metrics, self.threshold.value, 1.0, harm, firmness=firmness(best))

    def _search(self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome) -> tuple[float, float]:
        """The largest factor to which nothing objects, and the harm measured there over the factor; else (0, 0)."""
        totals = [layer.total.clone() for layer in editor.layers]
        try:
            for factor in FACTORS:
                for number, layer, total in zip(editor.layer_numbers, editor.layers, totals, strict=True):
                    layer.restore(total - (1 - factor) * outcome.updates[number])
                metrics = probes.measure_after(editor, outcome)
                if metrics is None:
                    continue  # a smaller fraction may leave the model finite
                metrics = replace(metrics, update_norm=factor * metrics.update_norm)
                harm = math.log1p(metrics.heldout_ppl_delta)
                if self.scorer.score(metrics) >= self.threshold.value and harm <= self.room:
                    return factor, harm / factor
            return 0.0, 0.0
        finally:
            for layer, total in zip(editor.layers, totals, strict=True):
                layer.restore(total)
