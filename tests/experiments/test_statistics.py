"""Intervals and differences against values worked out by hand."""

import math
from statistics import NormalDist

import pytest

from editlab.experiments.statistics import paired_differences, quantiles, t_interval, wilson


def t_quantile(freedom):
    """97.5% quantile of Student's t with one or two degrees of freedom, whose distribution has a closed form."""
    p = 0.975
    return math.tan(math.pi * (p - 0.5)) if freedom == 1 else (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))


def test_t_intervals_by_hand():
    # 1, 2, 3: standard deviation 1; 5, 9: standard deviation 8 ** 0.5.
    for values, mean, deviation in (([1.0, 2.0, 3.0], 2.0, 1.0), ([5.0, 9.0], 7.0, 8**0.5)):
        half = t_quantile(len(values) - 1) * deviation / len(values) ** 0.5
        assert t_interval(values) == pytest.approx((mean, mean - half, mean + half), abs=1e-12)


def test_quantiles_of_t_against_a_printed_table():
    for freedom, quantile in ((9, 2.262), (12, 2.179), (30, 2.042), (120, 1.980)):
        values = [(-1.0) ** i for i in range(freedom + 1)]
        mean, low, high = t_interval(values)
        variance = sum((value - mean) ** 2 for value in values) / freedom
        assert (high - low) / 2 / (variance / len(values)) ** 0.5 == pytest.approx(quantile, abs=6e-4)


def test_one_value_or_an_infinite_one_has_no_interval():
    for values, mean in (([5.0], 5.0), ([5.0, math.inf], math.inf)):
        found = t_interval(values)
        assert found[0] == mean
        assert math.isnan(found[1])
        assert math.isnan(found[2])
    assert math.isnan(t_interval([5.0, math.nan])[0])


def test_wilson_by_hand():
    # The ends of Wilson's interval are the fractions that the observed one is z of their standard errors away from.
    z = NormalDist().inv_cdf(0.975)
    for fraction, count in ((0.75, 100), (1.0, 128), (0.0, 8)):
        for p in wilson(fraction, count):
            assert abs(fraction - p) == pytest.approx(z * (p * (1 - p) / count) ** 0.5, abs=1e-12)
    # 80 of 128 is 0.625; a fraction that a table has rounded is of the same whole number.
    assert wilson(0.6171875, 128) == wilson(0.6172, 128)


def test_differences_are_paired_by_seed():
    rows = [{"case": case, "seed": str(seed), "x": x}
            for case, seed, x in (("a", 1, 0.5), ("a", 2, 0.9), ("b", 1, 0.75), ("b", 2, 1.15), ("b", 3, 0.1),
                                  ("c", 4, 0.0))]  # fmt: skip
    found = paired_differences(rows, "a", lambda row: row["x"])
    assert found == {"a": (0.0, 0.0, 0.0), "b": (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))}
    assert paired_differences(rows, "z", lambda row: row["x"]) == {}


def test_quantiles_by_hand():
    # Between five values there are four steps: 10% is 0.4 of the first step.
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0], (0.1, 0.5)) == pytest.approx([1.4, 3.0], abs=1e-12)
