"""Metrics against values by hand and implementations in plain Python, in one process and in two."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from editlab.metrics import (
    EditMetrics,
    EfficacyScore,
    GenerationEntropy,
    NeighborhoodScore,
    ParaphraseScore,
    PromptScores,
    RetentionByAge,
    TokenPerplexity,
)
from editlab.metrics.functional import harmonic_mean, ngram_entropy, prompt_values, record_means
from tests import ranked
from tests.metrics.tester import CASES, FIRST, NAN, SECOND, on_one_rank, pickled, scores, together

# Record 0 has two prompts, of which one prefers the new target; record 1 has one that does not.
HAND = scores([(0, 0.6, 0.2, True, False), (0, 0.1, 0.5, False, True), (1, 0.2, 0.3, False, False)])

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def close(found, expected, tolerance=1e-6):
    return found.tolist() == pytest.approx(expected, abs=tolerance)


# ---- every class -------------------------------------------------------------------------------------------------


@every_case
def test_updates_add_up_to_the_expected_value_and_to_the_function(case):
    metric = case.new()
    for arguments in case.updates:
        metric.update(*arguments)
    assert close(metric.compute(), case.expected)
    assert metric.compute().dtype == torch.float64
    assert close(case.function(*together(case.updates)), case.expected)


@every_case
def test_a_forward_call_gives_the_value_of_its_batch_and_keeps_it(case):
    metric = case.new()
    for arguments in case.updates:
        assert torch.equal(metric(*arguments), case.function(*arguments))
    assert close(metric.compute(), case.expected)


@every_case
def test_reset_pickle_clone_and_merge(case):
    first, second = case.new(), case.new()
    first.update(*case.updates[0])
    second.update(*case.updates[1])
    merged = pickled(first)
    merged.merge_state(second.clone())
    assert close(merged.compute(), case.expected)
    merged.reset()
    merged.update(*case.updates[1])
    assert torch.equal(merged.compute(), second.compute())


@pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")
def test_two_processes_compute_the_value_of_one(tmp_path):
    for found in ranked.together(2, tmp_path / "ranks", on_one_rank):
        assert not isinstance(found, Exception), found
        for name, case in CASES.items():
            assert found[name] == pytest.approx(case.expected, abs=1e-6), name
            assert found[f"{name}, own"]  # its own state is back after the synchronisation
        assert found["sparse"] == EfficacyScore()(scores(FIRST)).tolist()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_of_other_types(case, dtype):
    """bfloat16 has 8 bits and the probabilities differ by more, so only magnitudes and perplexities are rounded."""

    def cast(argument):
        if isinstance(argument, PromptScores):
            return PromptScores(
                **{n: c.to(dtype) if c.is_floating_point() else c for n, c in argument.columns().items()}
            )
        return argument.to(dtype) if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument

    metric = case.new()
    for arguments in case.updates:
        metric.update(*map(cast, arguments))
    rounded = {torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert close(metric.compute(), case.expected, rounded * max(1, torch.tensor(case.expected).abs().max().item()))
    assert metric.compute().dtype == torch.float64


def test_nothing_is_no_number():
    for metric in (EfficacyScore(), NeighborhoodScore("accuracy"), GenerationEntropy(), TokenPerplexity()):
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert math.isnan(float(metric.compute()))
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert RetentionByAge().compute().tolist() == []


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (EfficacyScore("score"), (0.5 + 0) / 2),  # mean over records of the mean over prompts, not 1/3
        (EfficacyScore("accuracy"), (0.5 + 0) / 2),
        (EfficacyScore("magnitude"), ((0.4 - 0.4) / 2 - 0.1) / 2),
        (ParaphraseScore("score"), 0.25),
        (NeighborhoodScore("score"), (0.5 + 1) / 2),  # P(true) > P(new)
        (NeighborhoodScore("accuracy"), (0.5 + 0) / 2),  # the argmax is the truth at the second prompt only
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


# ---- the collection of a group -----------------------------------------------------------------------------------


def test_all_numbers_of_a_group():
    metrics = EditMetrics(prefix="retained/")
    assert metrics.measured() == {}
    metrics.update(edit=HAND, paraphrases=None, neighbors=None)
    assert list(metrics.measured()) == ["retained/ES", "retained/accuracy", "retained/ES_magnitude"]
    assert math.isnan(float(metrics.compute()["retained/S"]))
    metrics.update(edit=scores([(2, 0.9, 0.1, True, False)]), paraphrases=HAND, neighbors=HAND)
    found = metrics.measured()
    assert list(found) == [
        f"retained/{name}"
        for name in ("ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy", "ES_magnitude",
                     "PS_magnitude", "NS_magnitude")
    ]  # fmt: skip
    es, ps, ns = (0.5 + 0 + 1) / 3, 0.25, 0.75
    assert found["retained/S"] == pytest.approx(3 / (1 / es + 1 / ps + 1 / ns))
    metrics.reset()
    assert metrics.measured() == {}
    assert metrics.scores() == {}


def test_a_group_keeps_each_column_once():
    """Metrics of the same prompts have one state, also after a reset and after further updates."""
    metrics = EditMetrics()
    for _ in range(2):
        metrics.reset()
        for part in (FIRST, SECOND):
            metrics.update(edit=scores(part), paraphrases=scores(part), neighbors=None)
        several = {name: metric.record for name, metric in metrics.items(copy_state=False)}
        assert several["ES"] is several["accuracy"] is several["ES_magnitude"]
        assert several["PS"] is several["paraphrase_accuracy"] is several["PS_magnitude"]
        assert several["ES"] is not several["PS"]
        assert len(metrics.scores()["edit"]) == len(FIRST) + len(SECOND)
        assert set(metrics.scores()) == {"edit", "paraphrases"}
    assert isinstance(metrics, MetricCollection)
    apart = EfficacyScore("accuracy")
    apart.update(scores(FIRST + SECOND))
    assert metrics.measured()["accuracy"] == float(apart.compute())


def test_a_group_called_forward_gives_its_batch():
    metrics, parts = EditMetrics(), [scores(FIRST), scores(SECOND)]
    for part in parts:
        found = metrics(edit=part, paraphrases=part, neighbors=part)
        assert {name: float(found[name]) for name in ("ES", "accuracy", "NS", "neighbor_accuracy")} == {
            "ES": float(EfficacyScore()(part)), "accuracy": float(EfficacyScore("accuracy")(part)),
            "NS": float(NeighborhoodScore()(part)), "neighbor_accuracy": float(NeighborhoodScore("accuracy")(part)),
        }  # fmt: skip
    whole = EditMetrics()
    both = scores(FIRST + SECOND)
    whole.update(edit=both, paraphrases=both, neighbors=both)
    assert metrics.measured() == whole.measured()


def test_harmonic_mean_of_a_zero_is_zero():
    assert float(harmonic_mean([0.0, 1.0, 1.0])) == 0


# ---- retention, entropy, perplexity ------------------------------------------------------------------------------


def test_retention_by_age():
    # Ages 1, 5, 9, of which the two oldest are lost: the newest half (of sizes 2 and 1) keeps one of two.
    rows = scores([(0, 0.1, 0.9, False, True), (1, 0.2, 0.8, False, True), (2, 0.7, 0.3, True, False)])
    metric = RetentionByAge(bins=2, kind="score")
    metric.update(rows, torch.tensor([9, 5, 1]))
    assert metric.compute().tolist() == [0.5, 0.0]
    assert RetentionByAge(bins=4)(rows, torch.tensor([9, 5, 1])).tolist() == [1.0, 0.0, 0.0]  # three edits, three bins
    with pytest.raises(ValueError, match="give one per edit"):
        RetentionByAge().update(rows, torch.tensor([1]))
    with pytest.raises(ValueError, match="bins is 0"):
        RetentionByAge(bins=0)


def test_retention_by_age_skips_facts_without_a_truth():
    rows = scores([(0, 0.1, 0.9, False, True), (1, 0.2, NAN, False, False), (2, 0.7, 0.3, True, False)])
    metric = RetentionByAge(bins=2, kind="score")
    metric.update(rows, torch.tensor([9, 5, 1]))
    assert metric.compute().tolist() == [1.0, 0.0]


def test_entropy_by_hand():
    # "a b a b": 2-grams ab, ba, ab -> H = log2 3 - 2/3; 3-grams aba, bab -> H = 1. GE = (2/3 H2 + 4/3 H3) / 2.
    expected = (2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2
    assert ngram_entropy([1, 2, 1, 2]) == pytest.approx(expected)
    assert math.isnan(ngram_entropy([1, 2]))
    metric = GenerationEntropy()
    metric.update([[1, 2, 1, 2], [5, 5, 5, 5], [1]])  # the last is too short to count
    assert float(metric.compute()) == pytest.approx(expected / 2)


def test_perplexity_by_hand():
    # exp of the mean of ln 2, ln 4, ln 8 = ln 4.
    metric = TokenPerplexity()
    metric.update(-torch.tensor([2.0, 4.0]).log())
    metric.update(-torch.tensor([[8.0]]).log())
    assert float(metric.compute()) == pytest.approx(4.0)


def test_bad_inputs():
    with pytest.raises(ValueError, match="one length"):
        PromptScores(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="score, accuracy, magnitude"):
        EfficacyScore("recall")
    with pytest.raises(ValueError, match="score, accuracy, magnitude"):
        prompt_values(HAND, "recall")
    assert record_means(torch.tensor([NAN]), torch.tensor([0])).shape == (0,)
