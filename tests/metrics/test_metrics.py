"""ES, PS, NS and company against cases worked out by hand, and against plain Python on random scores."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editlab.metrics import (
    EditMetrics,
    EfficacyScore,
    GenerationEntropy,
    NeighborhoodScore,
    ParaphraseScore,
    PromptScores,
    Retention,
    TokenPerplexity,
)
from editlab.metrics.functional import bootstrap_interval, harmonic_mean, judge, ngram_entropy, per_record

NAN = float("nan")


def scores(rows):
    """Rows of (record, P(new), P(true), hit_new, hit_true) as PromptScores."""
    record, new, true, hit_new, hit_true = zip(*rows, strict=True)
    return PromptScores(
        torch.tensor(new).log(), torch.tensor(true).log(), torch.tensor(hit_new), torch.tensor(hit_true),
        torch.tensor(record),
    )  # fmt: skip


# Record 0 has two prompts, of which one prefers the new target; record 1 has one that does not.
HAND = scores([(0, 0.6, 0.2, True, False), (0, 0.1, 0.5, False, True), (1, 0.2, 0.3, False, False)])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (EfficacyScore("score"), (0.5 + 0) / 2),  # mean over records of the mean over prompts, not 1/3
        (EfficacyScore("accuracy"), (0.5 + 0) / 2),
        (EfficacyScore("magnitude"), ((0.4 - 0.4) / 2 - 0.1) / 2),
        (ParaphraseScore("score"), 0.25),
        (NeighborhoodScore("score"), (0.5 + 1) / 2),  # P(true) > P(new)
        (NeighborhoodScore("accuracy"), (0.5 + 0) / 2),  # the truth is spelled by the second prompt only
        (NeighborhoodScore("magnitude"), (0 + 0.1) / 2),
    ],
)
def test_by_hand(metric, expected):
    metric.update(HAND)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)


# In hundredths: two of them are equal, or differ in float32 too.
probability = st.integers(1, 99).map(lambda hundredths: hundredths / 100)
prompt = st.tuples(
    st.integers(0, 4),
    probability,
    st.one_of(st.just(NAN), probability),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(prompt, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_against_plain_python_in_one_update_or_two(rows, cut):
    def oracle(judged):
        records = {}
        for row in rows:
            value = judged(*row[1:])
            if value is not None:
                records.setdefault(row[0], []).append(value)
        means = [sum(v) / len(v) for v in records.values()]
        return sum(means) / len(means) if means else NAN

    known = lambda true: not math.isnan(true)
    expected = {
        EfficacyScore: oracle(lambda n, t, hn, ht: float(n > t) if known(t) else None),
        NeighborhoodScore: oracle(lambda n, t, hn, ht: float(t > n) if known(t) else None),
    }
    for cls, value in expected.items():
        metric = cls()
        for part in (rows[:cut], rows[cut:]):
            if part:
                # float32 logarithms of equal probabilities are equal, of different ones different enough.
                metric.update(scores(part))
        got = float(metric.compute())
        assert (math.isnan(got) and math.isnan(value)) or got == pytest.approx(value, abs=1e-6)
    accuracy = EfficacyScore("accuracy")
    accuracy.update(scores(rows))
    assert float(accuracy.compute()) == pytest.approx(oracle(lambda n, t, hn, ht: float(hn)), abs=1e-6)


def test_a_fact_without_truth_counts_in_accuracy_only():
    rows = scores([(0, 0.5, NAN, True, False), (1, 0.5, 0.2, False, False)])
    for kind, expected in (("score", 1.0), ("accuracy", 0.5)):
        metric = EfficacyScore(kind)
        metric.update(rows)
        assert float(metric.compute()) == expected


def test_all_numbers_of_a_group():
    metrics = EditMetrics()
    assert metrics.compute() == {}
    metrics.update(HAND)
    assert set(metrics.compute()) == {"ES", "accuracy", "ES_magnitude"}
    metrics.update(scores([(2, 0.9, 0.1, True, False)]), HAND, HAND)
    found = metrics.compute()
    assert set(found) == {
        "ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy",
        "ES_magnitude", "PS_magnitude", "NS_magnitude",
    }  # fmt: skip
    es, ps, ns = (0.5 + 0 + 1) / 3, 0.25, 0.75
    assert float(found["S"]) == pytest.approx(3 / (1 / es + 1 / ps + 1 / ns))
    metrics.reset()
    assert metrics.compute() == {}


def test_harmonic_mean_of_a_zero_is_zero():
    assert float(harmonic_mean([0.0, 1.0, 1.0])) == 0


def test_state_pickles_and_merges_like_two_processes():
    one, two, both = EfficacyScore(), EfficacyScore(), EfficacyScore()
    other = scores([(7, 0.9, 0.1, True, False)])
    one.update(HAND)
    two.update(other)
    both.update(PromptScores.cat([HAND, other]))
    one = pickle.loads(pickle.dumps(one))
    one.merge_state(two)
    assert float(one.compute()) == float(both.compute())


def test_retention_by_age():
    # Ages 1, 5, 9, of which the two oldest are lost: the newest half (of sizes 2 and 1) keeps one of two.
    rows = scores([(0, 0.1, 0.9, False, True), (1, 0.2, 0.8, False, True), (2, 0.7, 0.3, True, False)])
    metric = Retention(age_bins=2)
    metric.update(rows, torch.tensor([9, 5, 1]))
    assert float(metric.compute()) == pytest.approx(1 / 3)
    assert [float(v) for v in metric.by_age()] == [0.5, 0.0]
    assert Retention().by_age() == []
    with pytest.raises(ValueError, match="needs the age"):
        Retention(age_bins=2).update(rows)
    with pytest.raises(ValueError, match="ages"):
        Retention().update(rows, torch.tensor([1]))
    with pytest.raises(ValueError, match="age_bins is -1"):
        Retention(age_bins=-1)


def test_retention_by_age_passes_over_facts_without_a_truth():
    nan = float("nan")
    rows = scores([(0, 0.1, 0.9, False, True), (1, 0.2, nan, False, False), (2, 0.7, 0.3, True, False)])
    metric = Retention(age_bins=2)
    metric.update(rows, torch.tensor([9, 5, 1]))
    assert [float(v) for v in metric.by_age()] == [1.0, 0.0]


def test_entropy_by_hand():
    # "a b a b": 2-grams ab, ba, ab -> H = log2 3 - 2/3; 3-grams aba, bab -> H = 1. GE = (2/3 H2 + 4/3 H3) / 2.
    expected = (2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2
    assert ngram_entropy([1, 2, 1, 2]) == pytest.approx(expected)
    assert math.isnan(ngram_entropy([1, 2]))
    metric = GenerationEntropy()
    assert math.isnan(float(metric.total / metric.texts))
    metric.update([[1, 2, 1, 2], [5, 5, 5, 5], [1]])  # the last is too short to count
    assert float(metric.compute()) == pytest.approx(expected / 2)


def test_perplexity_by_hand():
    # exp of the mean of ln 2, ln 4, ln 8 = ln 4.
    metric = TokenPerplexity()
    metric.update(-torch.tensor([2.0, 4.0]).log())
    metric.update(-torch.tensor([[8.0]]).log())
    assert float(metric.compute()) == pytest.approx(4.0)


def test_bootstrap_holds_the_mean_and_leaves_the_random_state_alone():
    values = torch.tensor([1.0] * 80 + [0.0] * 20)
    state = torch.get_rng_state()
    low, high = bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), state)
    # The binomial's standard error is sqrt(.8 * .2 / 100) = 0.04; 1.96 of it is 0.078.
    assert low == pytest.approx(0.8 - 0.078, abs=0.02)
    assert high == pytest.approx(0.8 + 0.078, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert all(math.isnan(x) for x in bootstrap_interval(torch.empty(0)))
    metric = EfficacyScore()
    metric.update(HAND)
    assert metric.interval()[0] <= float(metric.compute()) <= metric.interval()[1]


def test_bad_inputs():
    with pytest.raises(ValueError, match="one length"):
        PromptScores(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="score, accuracy, magnitude"):
        EfficacyScore("recall")
    with pytest.raises(ValueError, match="score, accuracy, magnitude"):
        judge(HAND, "recall")
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(torch.ones(2), confidence=1.0)
    assert per_record(torch.tensor([NAN]), torch.tensor([0])).shape == (0,)
