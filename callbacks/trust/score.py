"""The trust score of a batch of edits, its threshold and its harm budget: arithmetic on signals, without a model."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from editlab.errors import UserError
from editlab.utils.validation import fractions, not_negative

GAIN = "edit_success_gain"
"""The signal of which more is better."""


@dataclass(frozen=True)
class TrustMetrics:
    """The signals of one batch, or of one fact in it. All but the gain are better when they are small."""

    edit_success_gain: float = 0.0
    """rise of the target's mean log-probability per token, in nats; the mean over the facts"""
    certainty: float = 0.0
    """the target's probability per token after the edit, 0 to 1; a fact that is certain before the edit cannot gain"""
    heldout_ppl_delta: float = 0.0
    """relative rise of the perplexity on held-out sentences: 0.02 is 2%"""
    neighbor_flip_rate: float = 0.0
    """fraction of the neighbor statements right before that are wrong after"""
    confidence_shift: float = 0.0
    """rise of the largest next-token probability, mean over unrelated prompts"""
    update_norm: float = 0.0
    """Frobenius norm of the update over that of the original weight, the largest over layers; for one fact: the norm
    of its residual over the batch's median"""
    singular_growth: float = 0.0
    """relative growth of the weight's largest singular value, the largest over layers"""
    gram_condition: float = 0.0
    """log10 of the Gram matrix' condition number, the largest over layers"""
    effective_weight: float = 0.0
    """slack times lambda: how soft the constraints are against the metric"""
    attribution_focus_delta: float = 0.0
    """fraction of the attribution (gradient times input at the edited layer) that the subject's last token lost"""


PENALTIES = tuple(f.name for f in fields(TrustMetrics) if f.name not in (GAIN, "certainty"))


@dataclass(frozen=True)
class Scale:
    """Maps a signal to 0..1: 0 up to ``free``, one half at ``free + half``, and towards 1 beyond."""

    free: float
    half: float

    def __call__(self, value: float) -> float:
        """``1 - 2^(-(value - free) / half)`` above ``free``; non-decreasing."""
        return 1.0 - 2.0 ** (-max(0.0, value - self.free) / self.half)


SCALES: dict[str, Scale] = {
    GAIN: Scale(0.0, 1.5),
    "heldout_ppl_delta": Scale(0.03, 0.05),
    "neighbor_flip_rate": Scale(0.15, 0.15),
    "confidence_shift": Scale(0.02, 0.05),
    "update_norm": Scale(0.5, 0.5),
    "singular_growth": Scale(0.1, 0.2),
    "gram_condition": Scale(8.0, 2.0),
    "effective_weight": Scale(1e4, 1e4),
    "attribution_focus_delta": Scale(0.1, 0.2),
}
"""Scales that are used until a run's own are calibrated."""

NARROWEST: dict[str, float] = {
    GAIN: 0.5,
    "heldout_ppl_delta": 0.04,
    "neighbor_flip_rate": 0.15,
    "confidence_shift": 0.02,
    "update_norm": 0.1,
    "singular_growth": 0.05,
    "gram_condition": 1.0,
    "effective_weight": 1e3,
    "attribution_focus_delta": 0.1,
}
"""Least width that calibration gives: few probes give coarse signals, and few batches can agree by chance."""

WEIGHTS: dict[str, float] = {
    GAIN: 1.0,
    "heldout_ppl_delta": 1.0,
    "neighbor_flip_rate": 0.25,
    "confidence_shift": 0.5,
    "update_norm": 1.0,
}

FACT_SCALES: dict[str, Scale] = {"update_norm": Scale(3.0, 2.0), "neighbor_flip_rate": Scale(0.5, 1.0)}
"""Scales for single facts: a residual norm of up to three times the batch's median is usual."""


class TrustScorer:
    """Trust = weighted gain - weighted penalties, clipped to 0..1.

    A signal ``x`` is a penalty ``1 - 2^(-(x - free) / half)``. After ``calibrate`` batches ``free`` is their median
    plus three robust standard deviations (1.4826 times the median absolute deviation; :data:`NARROWEST` at least) and
    ``half`` three more, so that usual values in this run cost nothing; ``half`` of the gain is half the median gain.

    Args:
        weights: weights of the signals; those not named keep their :data:`WEIGHTS`, or 0.
        scales: signal -> ``[free, half]``, for signals that are not calibrated.
        calibrate: number of batches after which the scales are fixed; 0 keeps :data:`SCALES`.

    Raises:
        UserError: A signal is unknown, a weight is negative or not finite, or a scale is not two finite numbers of
            which the second is above 0.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        scales: Mapping[str, Sequence[float]] | None = None,
        calibrate: int = 4,
    ) -> None:
        for what, given in (("weights", weights or {}), ("scales", scales or {})):
            for name in given:
                if name not in SCALES:
                    raise UserError(f"TrustRollback.{what} names {name!r}: the signals are {', '.join(SCALES)}.")
        if any(weight < 0 for weight in (weights or {}).values()):
            raise UserError("TrustRollback.weights has a negative weight: penalties are subtracted already.")
        not_negative("TrustRollback.weights", **(weights or {}))
        for name, pair in (scales or {}).items():
            if len(pair) != 2 or not all(map(math.isfinite, pair)) or not pair[1] > 0:
                raise UserError(f"TrustRollback.scales.{name} is {list(pair)}: give [free, half] with half above 0.")
        not_negative("TrustRollback", calibrate=calibrate)
        self.weights = {**dict.fromkeys(SCALES, 0.0), **WEIGHTS, **(weights or {})}
        self.given = {name: Scale(*map(float, pair)) for name, pair in (scales or {}).items()}
        self.scales = {**SCALES, **self.given}
        self.calibrate = calibrate
        self.seen: list[TrustMetrics] = []

    def observe(self, metrics: TrustMetrics) -> None:
        """Adds one of the first batches to the calibration; later batches are ignored."""
        if len(self.seen) >= self.calibrate:
            return
        self.seen.append(metrics)
        if len(self.seen) == self.calibrate:
            columns = {name: [getattr(m, name) for m in self.seen] for name in SCALES}
            self.scales = {name: self.given.get(name) or _calibrated(name, column) for name, column in columns.items()}

    def score(self, metrics: TrustMetrics) -> float:
        """Trust in a batch, 0 to 1: non-decreasing in the gain, non-increasing in every other signal."""
        return self._score(metrics, self.scales)

    def score_fact(self, metrics: TrustMetrics) -> float:
        """Trust in one fact of a batch, by its own gain, neighbor and residual."""
        return self._score(metrics, {**self.scales, **FACT_SCALES}, tuple(FACT_SCALES))

    def ceiling(self, metrics: TrustMetrics) -> float:
        """The score that a batch which learns as much would have if it did no harm."""
        gain = max(self.scales[GAIN](metrics.edit_success_gain), metrics.certainty)
        return min(1.0, self.weights[GAIN] * gain)

    def costliest(self, metrics: TrustMetrics) -> str:
        """The signal that lowers a batch's score the most."""
        lost = {name: self.weights[name] * self.scales[name](getattr(metrics, name)) for name in self.scales}
        gain = max(self.scales[GAIN](metrics.edit_success_gain), metrics.certainty)
        lost[GAIN] = self.weights[GAIN] * (1 - gain)
        return max(lost, key=lambda name: lost[name])

    def _score(self, metrics: TrustMetrics, scales: Mapping[str, Scale], names: Sequence[str] = PENALTIES) -> float:
        gain = max(scales[GAIN](metrics.edit_success_gain), metrics.certainty)
        penalty = sum(self.weights[name] * scales[name](getattr(metrics, name)) for name in names)
        return min(1.0, max(0.0, self.weights[GAIN] * gain - penalty))

    def state_dict(self) -> list[dict[str, float]]:
        """The signals of the calibration batches."""
        return [asdict(metrics) for metrics in self.seen]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Loads what :meth:`state_dict` returned."""
        self.seen, self.scales = [], {**SCALES, **self.given}
        for metrics in state:
            self.observe(TrustMetrics(**metrics))


def _calibrated(name: str, values: Sequence[float]) -> Scale:
    middle = statistics.median(values)
    if name == GAIN:
        return Scale(0.0, max(middle / 2, NARROWEST[name]))
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    width = max(3 * spread, NARROWEST[name])
    return Scale(middle + width, width)


class HarmBudget:
    """Budget for harm that is small in each batch but adds up: a virtual queue of Lyapunov optimization (Neely 2010).

    The queue grows by what a batch's harm exceeds the allowance, ``Q <- max(0, Q + harm - allowance)``. While it is
    over the limit, batches that harm more than the allowance are not kept, so the harm kept over any stretch of ``n``
    batches is at most ``n * allowance + limit`` and one batch more.

    Args:
        allowance: harm that every batch may do, in nats of held-out log-perplexity.
        limit: length of the queue above which batches that exceed the allowance are refused.

    Raises:
        UserError: One of them is not above 0.
    """

    def __init__(self, allowance: float, limit: float) -> None:
        if not (allowance > 0 and limit > 0):
            raise UserError(f"TrustRollback.budget is [{allowance}, {limit}]: both must be above 0.")
        self.allowance = allowance
        self.limit = limit
        self.queue = 0.0

    def refuses(self, harm: float) -> bool:
        """Whether a batch that does this harm exceeds the budget."""
        return self.queue > self.limit and harm > self.allowance

    def spend(self, harm: float) -> None:
        """Adds the harm of what stayed of a batch; 0 for one that was rolled back."""
        self.queue = max(0.0, self.queue + harm - self.allowance)


class Threshold:
    """The score under which a batch is not kept: fixed, or the lower of that and a quantile of earlier scores.

    Args:
        value: the fixed threshold, 0 to 1; the moving one is never above it.
        quantile: fraction of the last ``window`` scores that lie under the moving threshold; None keeps it fixed.
        window: number of scores that the moving threshold is computed from.

    Raises:
        UserError: A fraction is out of range, or the window is under 2.
    """

    def __init__(self, value: float, quantile: float | None = None, window: int = 20) -> None:
        fractions("TrustRollback", threshold=value, quantile=quantile)
        if window < 2:
            raise UserError(f"TrustRollback.window is {window}: it must be at least 2.")
        self.fixed = value
        self.quantile = quantile
        self.scores: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """The threshold now."""
        if self.quantile is None or len(self.scores) < 2:
            return self.fixed
        ordered = sorted(self.scores)
        position = self.quantile * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return min(self.fixed, ordered[low] + (position - low) * (ordered[high] - ordered[low]))

    def note(self, score: float) -> None:
        """Adds a score to the window."""
        self.scores.append(score)
