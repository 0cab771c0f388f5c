"""Intervals and differences against values worked out by hand."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from editlab.experiments.statistics import (
    clopper_pearson,
    holm,
    paired_bootstrap,
    paired_differences,
    quantiles,
    roc_area,
    t_interval,
    wilson,
)


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


def test_clopper_pearson_by_its_definition():
    # Its ends are the fractions at which as many hits or more, or as many or fewer, have a probability of 2.5%.
    hits, count = 3, 10

    def at_most(k, p):
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    low, high = clopper_pearson(hits, count)
    assert 1 - at_most(hits - 1, low) == pytest.approx(0.025, abs=1e-9)
    assert at_most(hits, high) == pytest.approx(0.025, abs=1e-9)
    # All of n: the lower end to the power n is 2.5%.
    assert clopper_pearson(5, 5) == (pytest.approx(0.025 ** (1 / 5)), 1.0)
    assert clopper_pearson(0, 5) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))


def test_a_bootstrap_of_two_seeds_by_hand():
    # All facts of a seed differ alike, by 0.2 or 0.6: a draw is 0.2, 0.4 or 0.6, with probabilities 1/4, 1/2 and 1/4.
    baseline = {seed: dict.fromkeys("abc", 0.0) for seed in (1, 2)}
    setting = {1: dict.fromkeys("abc", 0.2), 2: dict.fromkeys("abcd", 0.6), 3: {"a": 1.0}}
    found = paired_bootstrap(setting, baseline, draws=4000)
    assert (found.difference, found.low, found.high) == pytest.approx((0.4, 0.2, 0.6))
    assert (found.seeds, found.facts) == (2, 6)  # what both have
    assert found.p == pytest.approx(2 / 4001)  # no draw is 0 or below
    # With differences of -0.5 and 0.5 a quarter of the draws is below 0, and half of them are 0.
    setting = {1: dict.fromkeys("abc", -0.5), 2: dict.fromkeys("abc", 0.5)}
    assert paired_bootstrap(setting, baseline, draws=4000).p == 1.0
    assert paired_bootstrap({4: {"a": 1.0}}, baseline) is None
    assert paired_bootstrap({1: {"z": 1.0}}, baseline) is None


def test_a_bootstrap_of_one_seed_against_the_binomial_distribution():
    # Of 40 facts the setting holds 8 that the baseline does not: the mean of a draw is Binomial(40, 0.2) / 40.
    setting = {1: {i: float(i < 8) for i in range(40)}}
    baseline = {1: dict.fromkeys(range(40), 0.0)}
    found = paired_bootstrap(setting, baseline, draws=20_000)
    ends = [stats.binom.ppf(q, 40, 0.2) / 40 for q in (0.025, 0.975)]
    assert (found.low, found.high) == pytest.approx(ends, abs=0.026)  # one fact of 40
    # p: twice the probability that no held fact is drawn.
    assert found.p == pytest.approx(2 * 0.8**40, abs=2e-3)
    assert paired_bootstrap(setting, baseline, draws=20_000) == found  # the draws have a seed
    assert paired_bootstrap(baseline, setting, draws=20_000).difference == -found.difference


def test_the_variance_of_a_bootstrap_of_several_seeds():
    # Var = between the seeds' means (divisor n) / S + mean of the variances within / (S facts), as resampling implies.
    generator = np.random.default_rng(3)
    values = generator.normal(size=(4, 50)) + np.array([[0.0], [0.1], [0.4], [0.5]])
    setting = {s: dict(enumerate(row)) for s, row in enumerate(values.tolist())}
    found = paired_bootstrap(setting, {s: dict.fromkeys(range(50), 0.0) for s in range(4)}, draws=20_000)
    variance = values.mean(axis=1).var() / 4 + values.var(axis=1).mean() / 4 / 50
    half = 1.96 * variance**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, none smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_area_against_mann_whitney_and_delong_by_hand():
    positive, negative = [3.0, 2.0, 5.0, 2.0], [1.0, 2.0, 0.0]
    # Pairs: 3 wins 3, each 2 wins 2 and ties 1, 5 wins 3: (3 + 2.5 + 3 + 2.5) / 12.
    assert roc_area(positive, negative).area == pytest.approx(11 / 12)
    draw = np.random.default_rng(1)
    x, y = draw.normal(1.0, 1.0, 60).round(1), draw.normal(0.0, 1.0, 40).round(1)
    found = roc_area(x, y)
    assert found.area == pytest.approx(stats.mannwhitneyu(x, y).statistic / (60 * 40))
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    variance = wins.mean(axis=1).var(ddof=1) / 60 + wins.mean(axis=0).var(ddof=1) / 40
    assert found.method == "DeLong"
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * variance**0.5, rel=1e-6)


def test_areas_of_few_and_of_separate_classes_are_exact():
    # Separate classes: the interval of Clopper and Pearson of as many hits as the smaller class has members.
    found = roc_area(range(100, 140), range(35))
    assert (found.area, found.high, found.method) == (1.0, 1.0, "exact")
    assert found.low == pytest.approx(clopper_pearson(35, 35)[0])
    assert roc_area([1.0], [2.0]).high == pytest.approx(0.975)
    # Few: both ends are at a divergence of ln 40 over the size of the smaller class.
    few = roc_area([3.0, 2.0, 5.0, 2.0], [1.0, 2.0, 0.0])
    assert few.method == "exact"
    a = 11 / 12
    for end in (few.low, few.high):
        divergence = a * math.log(a / end) + (1 - a) * math.log((1 - a) / (1 - end))
        assert divergence == pytest.approx(math.log(40) / 3, rel=1e-6)
    assert few.low < a < few.high < 1
    # One positive that beats only one of 1000 negatives says nothing about the lower end.
    assert roc_area([0.5], [0.0, *range(1, 1000)]).low == pytest.approx(0.0, abs=1e-12)


def test_exact_intervals_cover_the_true_area():
    # Uniform scores, shifted by a half: the true area is 1 - 1/8. With 5 and 8 members, of 400 samples at most 5% miss.
    draw = np.random.default_rng(0)
    missed = sum(
        not found.low <= 0.875 <= found.high
        for found in (roc_area(draw.uniform(0.5, 1.5, 5), draw.uniform(0, 1, 8)) for _ in range(400))
    )
    assert missed <= 20


@pytest.mark.parametrize("classes", [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.inf])])
def test_an_area_needs_finite_scores_of_both_classes(classes):
    with pytest.raises(ValueError, match="at least one score of each class"):
        roc_area(*classes)
