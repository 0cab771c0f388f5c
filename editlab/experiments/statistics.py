"""Statistics of results: intervals of means, fractions and areas; paired differences over seeds and facts; Holm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

Interval = tuple[float, float, float]
"""a mean and the two ends of its 95% interval"""

FEW = 30
"""Members of a class below which the interval of an area under an ROC curve is exact."""

_AT_ONCE = 1000
"""Draws of a bootstrap at a time, which bounds its memory."""
_TINY = 1e-300


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95% t-interval of a few independent values.

    The interval is NaN for a single value, or if one is not finite.
    """
    mean = statistics.mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """95% interval of a fraction that was observed on ``count`` facts (Wilson's score interval).

    Args:
        fraction: observed, of whole facts; what rounding it to a few digits has changed is undone.
        count: number of facts, at least 1.
    """
    interval = stats.binomtest(round(fraction * count), count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def clopper_pearson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a fraction that was observed as ``hits`` of ``count`` (Clopper and Pearson, 1934).

    It covers the true fraction with at least this confidence at every count, so it is wider than :func:`wilson`, whose
    confidence holds on average. Take it for few facts, or where none or all of them are hits.

    Args:
        hits: number of hits, from 0 to ``count``.
        count: number of facts, at least 1.
        confidence: of the interval.
    """
    interval = stats.binomtest(hits, count).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def paired_differences(
    rows: Sequence[Mapping[str, Any]], base: str, measure: Callable[[Mapping[str, Any]], float]
) -> dict[str, Interval]:
    """For each case the difference of a measure from the case ``base``, paired by seed: mean and 95% t-interval.

    Args:
        rows: with ``case`` and ``seed``.
        base: the case that is subtracted.
        measure: a number of a row.

    Returns:
        case -> interval; cases without a seed in common with ``base`` are absent.
    """
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        values.setdefault(row["case"], {})[int(row["seed"])] = measure(row)
    own = values.get(base, {})
    return {
        case: t_interval([value - own[seed] for seed, value in of_seed.items() if seed in own])
        for case, of_seed in values.items()
        if set(of_seed) & set(own)
    }


def quantiles(values: Sequence[float], probabilities: Sequence[float] = (0.025, 0.975)) -> list[float]:
    """Quantiles of some values, interpolated linearly."""
    return [float(value) for value in np.quantile(np.asarray(values, dtype=np.float64), probabilities)]


@dataclass(frozen=True)
class Difference:
    """A paired difference of two settings, in the metric's own unit."""

    difference: float
    """mean over seeds of the mean over facts"""
    low: float
    """lower end of its 95% interval"""
    high: float
    """upper end"""
    p: float
    """two-sided p-value of no difference"""
    seeds: int
    """number of seeds with facts in common"""
    facts: int
    """number of pairs, over all seeds"""


def paired_bootstrap(
    setting: Mapping[int, Mapping[Any, float]],
    baseline: Mapping[int, Mapping[Any, float]],
    draws: int = 10_000,
    seed: int = 0,
) -> Difference | None:
    """Difference of two settings' per-fact outcomes by a paired hierarchical bootstrap (Davison and Hinkley 1997, 3.8).

    Each draw takes as many seeds as there are, with replacement, and in each of them as many facts as it has, with
    replacement; both settings are read at the same seeds and facts. Its value is the mean over seeds of the mean over
    facts. The interval is between the 2.5% and 97.5% quantiles of the draws; p is twice the smaller of the fractions of
    draws that are at most 0 and at least 0, so that it is below 0.05 where the interval leaves out 0.

    With one seed the interval covers the choice of facts alone. With two or three seeds it can be much narrower than a
    t-interval over seeds, since so few seeds do not show how much seeds differ.

    Args:
        setting: seed -> fact -> value, such as 1 where the fact is held.
        baseline: the same of the setting that is subtracted.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        The difference over the facts that both settings have; None if there is no such fact.
    """
    pairs = [
        np.array([setting[s][fact] - baseline[s][fact] for fact in sorted(shared)], dtype=np.float64)
        for s in sorted(setting.keys() & baseline.keys())
        if (shared := setting[s].keys() & baseline[s].keys())
    ]
    if not pairs:
        return None
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    for _ in pairs:
        chosen = generator.integers(len(pairs), size=draws)
        for number, differences in enumerate(pairs):
            means[chosen == number] += _resampled_means(differences, int((chosen == number).sum()), generator)
    means /= len(pairs)
    low, high = quantiles(means.tolist())
    # The observed value counts as a draw, as no finite number of draws shows that p is 0.
    ends = [(1 + int((side * means <= 0).sum())) / (1 + draws) for side in (1, -1)]
    facts = sum(map(len, pairs))
    observed = float(np.mean([each.mean() for each in pairs]))
    return Difference(observed, low, high, min(1.0, 2 * min(ends)), len(pairs), facts)


def _resampled_means(values: NDArray[np.float64], draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Means of ``draws`` samples with replacement, each as large as ``values``.

    Drawing how often each distinct value occurs is the same as drawing facts, and fast for hits, which have few values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    found = [np.empty(0)]
    for start in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - start)
        found.append(generator.multinomial(len(values), counts / len(values), size=size) @ distinct / len(values))
    return np.concatenate(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of one family of comparisons (Holm, 1979).

    A difference survives at 5% if its corrected p is below 0.05: the probability that any difference of the family that
    does not exist survives is then at most 5%, whether or not the comparisons are independent.

    Returns:
        The corrected p-values, in the order of ``p_values``.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = largest
    return found


@dataclass(frozen=True)
class Area:
    """Area under an ROC curve with its 95% interval."""

    area: float
    low: float
    high: float
    method: str
    """``exact`` or ``DeLong``"""


def roc_area(positive: Sequence[float], negative: Sequence[float]) -> Area:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    The interval is DeLong's (DeLong, DeLong and Clarke-Pearson, 1988), whose normal approximation needs many of each
    class. If either class has fewer than :data:`FEW` members, or one class lies wholly above the other (where the
    variance is estimated as 0), it is *exact*: all areas a with k KL(observed, a) <= ln(2 / 0.05), where k is the size
    of the smaller class and KL the divergence of two Bernoulli distributions. By Hoeffding's bound for two-sample
    U-statistics (Hoeffding, 1963, section 5b) it covers the true area with at least 95% confidence whatever the
    distributions. At perfect separation it ends at 0.025 ** (1 / k), as the Clopper-Pearson interval of k hits of k.

    Args:
        positive: finite scores of one class, at least one.
        negative: finite scores of the other class, at least one.

    Raises:
        ValueError: if a class is empty, or a score is not finite.
    """
    x, y = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if not len(x) or not len(y) or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError("An ROC curve needs at least one score of each class, all finite.")
    ranks = stats.rankdata(np.concatenate([x, y]))
    above = (ranks[: len(x)] - stats.rankdata(x)) / len(y)  # of each positive: the fraction of negatives below it
    below = 1 - (ranks[len(x) :] - stats.rankdata(y)) / len(x)
    area, smaller = float(above.mean()), min(len(x), len(y))
    if smaller < FEW or area in (0.0, 1.0):
        return Area(area, *_exact_ends(area, smaller), "exact")
    half = float(stats.norm.ppf(0.975)) * math.sqrt(above.var(ddof=1) / len(x) + below.var(ddof=1) / len(y))
    return Area(area, max(0.0, area - half), min(1.0, area + half), "DeLong")


def _exact_ends(area: float, smaller: int) -> tuple[float, float]:
    """The ends of the exact interval of :func:`roc_area`; the divergence is the same for 1 - area."""
    limit = math.log(2 / 0.05) / smaller
    return _lowest(area, limit), 1 - _lowest(1 - area, limit)


def _lowest(area: float, limit: float) -> float:
    """The smallest a with KL(area, a) <= limit."""

    def excess(other: float) -> float:
        parts = ((area, other), (1 - area, 1 - other))
        return sum(p * math.log(p / q) for p, q in parts if p > 0) - limit

    if area == 0 or excess(_TINY) <= 0:
        return 0.0
    return float(brentq(excess, _TINY, area, xtol=1e-14))
