"""Intervals and differences over seeds and facts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Interval = tuple[float, float, float]
"""a mean and the two ends of its 95% interval"""


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
