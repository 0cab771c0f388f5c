"""The verdict on a batch of edits: its score against the threshold, its harm against the budget, its worst facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from callbacks.trust.probes import Probes
from callbacks.trust.score import FACT_SCALES, GAIN, HarmBudget, Threshold, TrustMetrics, TrustScorer
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome

ACTIONS = ("rollback", "scale", "search")
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

    @property
    def decision(self) -> str:
        """``keep``, ``scale`` or ``rollback``."""
        return "keep" if self.factor == 1 else "scale" if self.factor else "rollback"


@dataclass
class Judge:
    """Decides which fraction of a batch's update stays, and which of its facts are dropped."""

    scorer: TrustScorer
    threshold: Threshold
    budget: HarmBudget | None
    granularity: str
    """``batch``, or ``edit``: facts that score low are dropped first"""
    action: str
    """action on a batch under the threshold: ``rollback``, ``scale`` or ``search``"""
    fact_events: list[dict[str, Any]] = field(default_factory=list)
    """one event for each fact, if the facts of the present batch were scored; cleared before each batch"""

    def decide(self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome) -> Verdict:
        """The verdict on a batch whose update is in the weights; the outcome does not change."""
        threshold = self.threshold.value
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
        score, threshold = self.scorer.score(metrics), self.threshold.value
        harm = math.log1p(metrics.heldout_ppl_delta)
        if self.budget and self.budget.refuses(harm):
            reason = f"harm {harm:.3f} while {self.budget.queue:.3f} is over the budget of {self.budget.limit}"
            return Verdict(reason, score, metrics, threshold, 0.0, harm)
        if score >= threshold:
            return Verdict("", score, metrics, threshold, 1.0, harm)
        reason = f"score {score:.2f} is under {threshold:.2f} ({_costliest_signal(self.scorer, metrics)})"
        factor = 0.0
        if self.action == "scale":
            factor = max(0.0, 2 * score / max(threshold, 1e-12) - 1)
        elif self.action == "search":
            factor, harm = self._search(probes, editor, outcome, threshold)
        return Verdict(reason, score, metrics, threshold, factor, harm)

    def _search(
        self, probes: Probes, editor: SequentialEditor, outcome: EditOutcome, threshold: float
    ) -> tuple[float, float]:
        """The largest factor that scores high enough, and the harm measured there over the factor; else (0, 0)."""
        totals = [layer.total.clone() for layer in editor.layers]
        try:
            for factor in FACTORS:
                for number, layer, total in zip(editor.layer_numbers, editor.layers, totals, strict=True):
                    layer.restore(total - (1 - factor) * outcome.updates[number])
                metrics = probes.measure_after(editor, outcome)
                if metrics is None:
                    continue  # a smaller fraction may leave the model finite
                metrics = replace(metrics, update_norm=factor * metrics.update_norm)
                if self.scorer.score(metrics) >= threshold:
                    return factor, math.log1p(metrics.heldout_ppl_delta) / factor
            return 0.0, 0.0
        finally:
            for layer, total in zip(editor.layers, totals, strict=True):
                layer.restore(total)


def _costliest_signal(scorer: TrustScorer, metrics: TrustMetrics) -> str:
    """Name and value of the signal that lowers a batch's score the most."""
    lost = {name: scorer.weights[name] * scorer.scales[name](getattr(metrics, name)) for name in scorer.scales}
    lost[GAIN] = scorer.weights[GAIN] * (1 - max(scorer.scales[GAIN](metrics.edit_success_gain), metrics.certainty))
    name = max(lost, key=lambda n: lost[n])
    return f"{name} {getattr(metrics, name):.3g}"
