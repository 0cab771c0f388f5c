"""The trust score by hand-worked cases, its range and monotonicity, the budget's bound and the moving threshold."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.trust.score import (
    GAIN,
    NARROWEST,
    PENALTIES,
    SCALES,
    HarmBudget,
    Scale,
    Threshold,
    TrustMetrics,
    TrustScorer,
)
from editlab.errors import UserError

NUMBERS = st.floats(-50, 50)
METRICS = st.builds(TrustMetrics, **{f.name: NUMBERS for f in fields(TrustMetrics)}).map(
    lambda m: replace(m, certainty=abs(m.certainty) / 50)
)


def test_a_scale_by_hand():
    scale = Scale(2.0, 0.5)
    # nothing up to free, a half at free + half, three quarters one half further on
    assert [scale(x) for x in (-1.0, 2.0, 2.5, 3.0)] == [0, 0, 0.5, 0.75]


def test_a_score_by_hand():
    # A rise of 3 nats at half = 1.5: 1 - 2^-2 = .75; perplexity +13% at [.03, .05]: 1 - 2^-2 = .75 of weight 0.4;
    # a flip rate of .3 at [.15, .15]: a half, of weight 0.25. In all .75 - .3 - .125 = .325.
    scorer = TrustScorer(weights={"heldout_ppl_delta": 0.4}, calibrate=0)
    metrics = TrustMetrics(3.0, 0.1, heldout_ppl_delta=0.13, neighbor_flip_rate=0.3)
    assert scorer.score(metrics) == pytest.approx(0.325)
    # What the model is sure of need not rise: .9 in place of the rise's 0.
    assert scorer.score(TrustMetrics(0.0, 0.9)) == pytest.approx(0.9)
    # The cheap signals have no weight unless one is given.
    assert scorer.score(TrustMetrics(30.0, gram_condition=300.0)) == pytest.approx(1.0, abs=1e-5)
    assert TrustScorer(weights={"gram_condition": 1.0}).score(TrustMetrics(30.0, gram_condition=300.0)) < 1e-3


def test_the_score_of_a_fact_by_hand():
    # A gain of 1.5 is a half; its flipped neighbor costs .25 (1 - 2^-.5) and a residual of 5 medians 1.0 * .5.
    metrics = TrustMetrics(1.5, neighbor_flip_rate=1.0)
    assert TrustScorer().score_fact(metrics) == pytest.approx(0.5 - 0.25 * (1 - 2**-0.5))
    assert TrustScorer().score_fact(TrustMetrics(1.5, update_norm=5.0)) == 0
    assert TrustScorer().score_fact(TrustMetrics(1.5, update_norm=3.0)) == 0.5
    # What the whole batch did is not one fact's.
    assert TrustScorer().score_fact(TrustMetrics(1.5, heldout_ppl_delta=9.0, confidence_shift=9.0)) == 0.5


@given(METRICS, st.dictionaries(st.sampled_from(list(SCALES)), st.floats(0, 5)))
def test_range(metrics, weights):
    scorer = TrustScorer(weights)
    assert 0 <= scorer.score(metrics) <= 1
    assert 0 <= scorer.score_fact(metrics) <= 1


@given(METRICS, st.sampled_from([GAIN, "certainty", *PENALTIES]), st.floats(0, 20), st.lists(METRICS, max_size=4))
def test_monotone_whatever_the_calibration(metrics, name, more, seen):
    scorer = TrustScorer(dict.fromkeys(SCALES, 0.3) | {GAIN: 1.0}, calibrate=len(seen))
    for past in seen:
        scorer.observe(past)
    changed = replace(metrics, **{name: getattr(metrics, name) + more})
    for score in (scorer.score, scorer.score_fact):
        if name in (GAIN, "certainty"):
            assert score(changed) >= score(metrics)
        else:
            assert score(changed) <= score(metrics)


def test_calibration_by_hand():
    scorer = TrustScorer(scales={"confidence_shift": [0.5, 0.25]}, calibrate=5)
    for delta, gain in ((0.1, 6.0), (0.2, 9.0), (0.3, 12.0), (0.4, 7.0), (9.0, 8.0)):
        assert scorer.scales["heldout_ppl_delta"] == SCALES["heldout_ppl_delta"]  # until the last of them
        scorer.observe(TrustMetrics(gain, heldout_ppl_delta=delta))
    # Median .3; distances .2 .1 0 .1 8.7 have the median .1; three robust deviations are 3 * 1.4826 * .1.
    width = 3 * 1.4826 * 0.1
    found = scorer.scales["heldout_ppl_delta"]
    assert (found.free, found.half) == (pytest.approx(0.3 + width), pytest.approx(width))
    assert scorer.scales[GAIN] == Scale(0.0, 4.0)
    # All flip rates were 0: the width is the narrowest. What is given is not calibrated.
    assert scorer.scales["neighbor_flip_rate"] == Scale(
        NARROWEST["neighbor_flip_rate"], NARROWEST["neighbor_flip_rate"]
    )
    assert scorer.scales["confidence_shift"] == Scale(0.5, 0.25)
    before = dict(scorer.scales)
    scorer.observe(TrustMetrics(heldout_ppl_delta=100.0))
    assert scorer.scales == before
    other = TrustScorer(scales={"confidence_shift": [0.5, 0.25]}, calibrate=5)
    other.load_state_dict(scorer.state_dict())
    assert other.scales == scorer.scales


@given(st.lists(st.floats(-0.2, 0.5), max_size=60))
def test_the_budget_bounds_what_adds_up(harms):
    budget = HarmBudget(0.02, 0.1)
    kept, largest = [], 0.0
    for harm in harms:
        stays = 0.0 if budget.refuses(harm) else harm
        kept.append(stays)
        largest = max(largest, harm)
        budget.spend(stays)
    # Over any stretch: n allowances, the limit, and the batch that went over it.
    sums = np.concatenate([[0.0], np.cumsum(kept)])
    for start in range(len(sums)):
        for stop in range(start, len(sums)):
            assert sums[stop] - sums[start] <= (stop - start) * 0.02 + 0.1 + largest + 1e-9


def test_harm_that_is_small_each_time_trips_the_budget():
    budget = HarmBudget(0.01, 0.05)
    refused = []
    for _ in range(20):
        refused.append(budget.refuses(0.03))
        budget.spend(0.0 if refused[-1] else 0.03)
    # The queue grows by .02 a batch and is over .05 after three; from then on one in three goes through: .01 a batch.
    assert refused[:4] == [False, False, False, True]
    assert not budget.refuses(0.01)  # what is within the allowance is never refused
    assert 3 + 17 // 3 <= refused.count(False) <= 3 + 17 // 3 + 1


def test_the_threshold_may_move_but_never_up():
    threshold = Threshold(0.5, quantile=0.25, window=4)
    assert threshold.value == 0.5
    scores = [0.9, 0.1, 0.2, 0.3, 0.4]
    for score in scores:
        threshold.note(score)
    assert threshold.value == pytest.approx(np.quantile(scores[-4:], 0.25))
    for _ in range(4):
        threshold.note(1.0)
    assert threshold.value == 0.5
    fixed = Threshold(0.5)
    fixed.note(0.0), fixed.note(0.0)
    assert fixed.value == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustScorer(weights={"charm": 1.0}), "names 'charm': the signals are edit_success_gain"),
        (lambda: TrustScorer(weights={GAIN: -1.0}), "negative weight"),
        (lambda: TrustScorer(weights={"update_norm": math.nan}), "weights.update_norm is nan"),
        (lambda: TrustScorer(weights={"update_norm": math.inf}), "weights.update_norm is inf: it must be finite"),
        (lambda: TrustScorer(scales={GAIN: [math.nan, 1.0]}), "give .free, half."),
        (lambda: TrustScorer(scales={GAIN: [1.0, math.inf]}), "give .free, half."),
        (lambda: TrustScorer(scales={GAIN: [1.0, 0.0]}), "half above 0"),
        (lambda: TrustScorer(scales={GAIN: [1.0]}), "give .free, half."),
        (lambda: TrustScorer(calibrate=-1), "calibrate is -1"),
        (lambda: HarmBudget(0.0, 1.0), "both must be above 0"),
        (lambda: Threshold(1.5), "threshold is 1.5"),
        (lambda: Threshold(0.5, quantile=-0.1), "quantile is -0.1"),
        (lambda: Threshold(0.5, quantile=0.1, window=1), "window is 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_nothing_is_infinite():
    assert math.isfinite(TrustScorer().score(TrustMetrics(1e30, 1.0, *[1e30] * 8)))
