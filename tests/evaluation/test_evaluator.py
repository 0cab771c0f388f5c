"""What a run measures, against the pieces it is made of."""

import dataclasses
import json
import math

import pytest
import torch

from editlab.errors import UserError
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.language import BUILTIN_TEXT, OPENING
from editlab.evaluation.scoring import prefers_truth, score_facts, token_log_probs
from editlab.evaluation.settings import EvaluationSettings
from editlab.lm.language_model import LanguageModel
from editlab.metrics.functional import ngram_entropy
from editlab.metrics.names import add_group
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())


class Rows:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.rows = {}

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)


def test_language_is_perplexity_and_entropy_of_the_held_out_text(lm):
    settings = EvaluationSettings(heldout_tokens=300, generated_texts=3, generated_tokens=10)
    found = Evaluation(settings).language(lm)
    ids = lm.tokenizer(BUILTIN_TEXT.read_text())["input_ids"][:300]
    assert found["perplexity"] == pytest.approx(float((-token_log_probs(lm, ids)).mean().exp()), rel=1e-5)
    texts = lm.sample([ids[i * OPENING : (i + 1) * OPENING] for i in range(3)], 10, seed=0)
    expected = sum(ngram_entropy(text[OPENING:]) for text in texts) / 3
    assert found["generation_entropy"] == pytest.approx(expected)


def test_what_is_not_asked_for_is_absent(lm):
    assert Evaluation(EvaluationSettings(heldout_tokens=0)).language(lm) == {}
    assert set(Evaluation(EvaluationSettings(heldout_tokens=64, generated_texts=0)).language(lm)) == {"perplexity"}
    assert Evaluation(EvaluationSettings()).compute("before") == {}


def test_a_broken_model_has_no_entropy_and_no_end_of_its_own(lm, caplog):
    with torch.no_grad():
        lm.anatomy.edit_module(1).weight[0, 0] = math.nan
    found = Evaluation(EvaluationSettings(heldout_tokens=64)).language(lm)
    assert list(found) == ["perplexity"]
    assert math.isnan(found["perplexity"])
    assert "The generation entropy is left out." in caplog.text


def test_groups_add_up(lm):
    lm.double()  # rows that go with others are rounded otherwise in float32
    evaluation = Evaluation(EvaluationSettings())
    parts = [evaluation.update("immediate", lm, facts) for facts in (FACTS[:2], FACTS[2:3])]
    together = evaluation.compute("immediate")
    assert together == add_group("immediate", evaluation.measure(lm, FACTS[:3]))
    accuracies = [part["immediate/accuracy"] for part in parts]
    assert together["immediate/accuracy"] == pytest.approx((2 * accuracies[0] + accuracies[1]) / 3)
    assert evaluation.series("immediate") == {2: parts[0], 3: parts[1]}


def test_products_may_be_rounded_for_all_that_is_measured(lm):
    """Unlike float32's, and as near to them as bfloat16's eight bits; nothing else of the model is changed."""
    settings = {"generated_texts": 0, "heldout_tokens": 300}
    exact, rounded = (Evaluation(EvaluationSettings(matmul=m, **settings)) for m in ("float32", "bfloat16"))
    plain = score_facts(lm, FACTS).edit
    for evaluation in (rounded, exact):
        evaluation.update("before", lm, FACTS)
    apart = [float((e.scores("before").edit.logp_new - plain.logp_new).abs().max()) for e in (exact, rounded)]
    assert apart[0] == 0
    assert 0 < apart[1] < 0.05
    perplexities = [e.language(lm)["perplexity"] for e in (exact, rounded)]
    assert perplexities[0] != perplexities[1] == pytest.approx(perplexities[0], rel=0.01)
    with exact.products(lm):
        preferred = prefers_truth(lm, FACTS)
    assert preferred == (plain.logp_true > plain.logp_new).tolist()


def test_scores_with_other_products_are_cached_apart(lm):
    caches = [Evaluation(EvaluationSettings(matmul=m)).cache(lm, "f" * 64).folder for m in ("float32", "bfloat16")]
    assert [path.name for path in caches] == ["f" * 32, "f" * 32 + "-bfloat16"]


@pytest.mark.parametrize("neighbors", [0, 1])
def test_neighbors_of_a_fact_may_be_limited(lm, neighbors):
    assert all(len(fact.neighbors) > 1 for fact in FACTS[:3])
    cut = [dataclasses.replace(fact, neighbors=fact.neighbors[:neighbors]) for fact in FACTS[:3]]
    limited = Evaluation(EvaluationSettings(neighbors=neighbors)).measure(lm, FACTS[:3])
    assert limited == Evaluation(EvaluationSettings()).measure(lm, cut)
    assert ("NS" in limited) == bool(neighbors)


def test_a_point_of_a_series_is_a_whole_update(lm, monkeypatch):
    monkeypatch.setattr("editlab.evaluation.evaluator.CHUNK", 2)
    evaluation = Evaluation(EvaluationSettings())
    numbers = [evaluation.update("immediate", lm, FACTS[:5]), evaluation.update("immediate", lm, FACTS[5:6])]
    assert evaluation.series("immediate") == {5: numbers[0], 6: numbers[1]}
    state = evaluation.state_dict()
    other = Evaluation(EvaluationSettings())
    other.load_state_dict(state)
    assert other.series("immediate") == evaluation.series("immediate")
    evaluation.begin("immediate")
    assert (evaluation.series("immediate"), evaluation.compute("immediate")) == ({}, {})
    assert evaluation.scores("immediate") is None
    assert evaluation.update("immediate", lm, []) == evaluation.series("immediate") == {}


def test_state_goes_round(lm, tmp_path):
    evaluation = Evaluation(EvaluationSettings(heldout_tokens=64))
    evaluation.measure_unedited(lm)
    evaluation.update("before", lm, FACTS[:2])
    torch.save(evaluation.state_dict(), tmp_path / "state")
    other = Evaluation(EvaluationSettings(heldout_tokens=64))
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.compute("before") == evaluation.compute("before")
    assert other.language_before == evaluation.language_before
    assert other.seconds > 0
    for one in (other, evaluation):  # records are numbered on from there
        one.update("before", lm, FACTS[2:3])
        assert one.scores("before").edit.record.tolist() == [0, 1, 2]
    assert other.results() == evaluation.results()


def test_a_checkpoint_of_another_layout_is_refused():
    state = {"scores": {"before": []}, "ends": {}, "language_before": {}, "seconds": 1.0}
    with pytest.raises(UserError, match="another version of editlab: start a new run"):
        Evaluation(EvaluationSettings()).load_state_dict(state)


def test_retention_is_measured_once_for_a_state_and_by_age(lm, monkeypatch):
    evaluation = Evaluation(EvaluationSettings(heldout_tokens=64, age_bins=2, generation=1))
    rows = Rows()
    first = evaluation.measure_retained(lm, FACTS[:4], 4, [rows])
    monkeypatch.setattr("editlab.evaluation.evaluator.score_facts", None)  # would fail if it were measured again
    assert evaluation.measure_retained(lm, FACTS[:4], 4, [rows]) == first
    logged = rows.rows[4]
    # The bins hold the two newest and the two oldest edits; their mean is the whole.
    halves = [logged["retained/accuracy_age_1"], logged["retained/accuracy_age_2"]]
    assert sum(halves) / 2 == pytest.approx(first["retained/accuracy"])
    assert logged == first
    assert {"retained/perplexity", "retained/generation_entropy", "retained/ES", "retained/generation"} <= set(first)
    assert evaluation.results() == first  # nothing else was measured
    without = Evaluation(EvaluationSettings(heldout_tokens=0, age_bins=0, generation=0))
    monkeypatch.undo()
    assert set(without.measure_retained(lm, FACTS[:1], 1, [])) == set(without.compute("retained"))
    one = Evaluation(EvaluationSettings(heldout_tokens=0)).measure_retained(lm, FACTS[:1], 1, [])
    assert one["retained/accuracy_age_1"] == one["retained/accuracy"]
    assert without.measure_retained(lm, [], 2, []) == {}
    json.dumps(logged)


def test_bad_settings(lm, tmp_path):
    with pytest.raises(UserError, match="heldout_tokens is -1"):
        EvaluationSettings(heldout_tokens=-1)
    with pytest.raises(UserError, match=r"heldout_tokens is 1, .* set at least 2, or 0"):
        EvaluationSettings(heldout_tokens=1)
    with pytest.raises(UserError, match="neighbors is -2"):
        EvaluationSettings(neighbors=-2)
    with pytest.raises(UserError, match="matmul is 'half'"):
        EvaluationSettings(matmul="half")
    with pytest.raises(UserError, match="does not exist"):
        Evaluation(EvaluationSettings(heldout=str(tmp_path / "none"))).language(lm)
