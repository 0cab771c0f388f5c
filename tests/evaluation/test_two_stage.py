"""Scores in two stages: the decisions of float32, with the numbers of bfloat16 where no decision is near a tie."""

import logging

import pytest
import torch

from editlab.data.fact import Fact
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.score_cache import RoughScore, ScoreCache
from editlab.evaluation.scoring import score_facts, score_pairs
from editlab.evaluation.settings import EvaluationSettings
from editlab.evaluation.two_stage import CONTROL, first_stage, near_ties, refine
from editlab.lm.language_model import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer

A, B, C, D = (((number,), 0) for number in range(4))
WORDS = ["Paris", "Tokyo", "Lima", "Oslo", "Norway", "Peru", "Japan", "France", "Rome", "Italy"]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def lm():
    """A model whose logits are spread over tens of nats, so that not every prompt is near a tie."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(60)
    return LanguageModel(model, tiny_tokenizer())


@pytest.fixture(autouse=True)
def _able(monkeypatch):
    monkeypatch.setattr("editlab.evaluation.two_stage.multiplies_bfloat16", lambda device: True)


def test_near_ties_are_targets_whose_hit_or_whose_comparison_is_within_the_margin():
    rough = {A: RoughScore(-1.0, True, 5.0), B: RoughScore(-1.3, False, 5.0), C: RoughScore(-4.0, False, 0.2)}
    assert near_ties(rough, [(A, B), (A, C)], 0.25) == {C}  # by its argmax
    assert near_ties(rough, [(A, B), (A, C)], 0.5) == {A, B, C}
    assert near_ties(rough, [(A, C)], 0.1) == set()
    nan = {A: RoughScore(float("nan"), False, 5.0), B: RoughScore(-1.0, False, 5.0)}
    assert near_ties(nan, [(A, B)], 0.1) == {A, B}


def test_refine_widens_the_margin_where_rounding_is_larger_than_expected(caplog):
    """A is near a tie and its two scores are 1.0 apart, so a margin of 1.5 is needed, which brings in B and C."""
    rough = {A: RoughScore(-3.0, False, 0.1), B: RoughScore(-1.0, False, 9.0), C: RoughScore(-2.25, False, 9.0)}
    rough |= {D: RoughScore(-9.0, False, 9.0)}
    exact = {A: (-4.0, True), B: (-1.0, False), C: (-2.25, False), D: (-9.0, True)}
    asked = []

    def again(requests):
        asked.append(list(requests))
        return {request: exact[request] for request in requests}

    with caplog.at_level(logging.INFO):
        found = refine(rough, [(B, C), (B, D)], again, margin=0.5)
    assert asked == [[A], [B, C]]
    assert found == exact | {D: (-9.0, False)}  # far from any tie: the first stage's
    assert "within 1.50 nats" in caplog.text


def test_refine_scores_some_targets_again_wherever_they_stand():
    rough = {((i,), 0): RoughScore(-float(i), False, 99.0) for i in range(2 * CONTROL)}
    asked = []
    refine(rough, [], lambda some: asked.extend(some) or {request: (rough[request].logp, False) for request in some})
    assert asked == [((0,), 0), ((CONTROL,), 0)]


def close_calls(lm: LanguageModel) -> list[Fact]:
    """Facts of two words each, of which rounding turns some comparisons: all pairs of words after a prompt."""
    pairs = [(a, b) for i, a in enumerate(WORDS) for b in WORDS[:i]]
    return [Fact("France", "The capital of {} is", a, b) for a, b in pairs]


def test_decisions_are_float32s_where_bfloat16_alone_turns_them(lm):
    """The oracle is float32; among the pairs of 60 answers some are so near a tie that bfloat16 alone turns them."""
    answers = [a + b for a in "abcdefghij" for b in "ostuvw"]
    texts = [(PROMPT, answer) for answer in answers]
    exact, _ = score_pairs(lm, texts)
    with first_stage(lm):
        rough, _ = score_pairs(lm, texts)
    order = [(i, j) for i in range(len(answers)) for j in range(i)]
    turned = [(i, j) for i, j in order if (exact[i] > exact[j]) != (rough[i] > rough[j])]
    assert turned  # or the case tests nothing
    found, _ = score_pairs(lm, texts, compared=[(texts[i], texts[j]) for i, j in order])
    assert [bool(found[i] > found[j]) for i, j in order] == [bool(exact[i] > exact[j]) for i, j in order]


def test_scores_of_facts_keep_float32s_decisions_and_most_of_bfloat16s_numbers(lm):
    facts = close_calls(lm)
    exact = score_facts(lm, facts).edit
    with first_stage(lm):
        rough = score_facts(lm, facts).edit
    both = score_facts(lm, facts, two_stage=True).edit
    assert torch.equal(both.logp_new > both.logp_true, exact.logp_new > exact.logp_true)
    assert torch.equal(both.hit_new, exact.hit_new)
    again = torch.isclose(both.logp_new, exact.logp_new, rtol=0, atol=1e-3)  # other rows stand next to them there
    assert (again | (both.logp_new == rough.logp_new)).all()
    assert 0 < int(again.sum()) < len(facts)


def test_without_bfloat16_instructions_or_float32_weights_there_is_one_stage(lm, monkeypatch):
    facts = close_calls(lm)[:5]
    exact = score_facts(lm, facts).edit
    monkeypatch.setattr("editlab.evaluation.two_stage.multiplies_bfloat16", lambda device: False)
    assert torch.equal(score_facts(lm, facts, two_stage=True).edit.logp_new, exact.logp_new)


def test_both_stages_are_cached_apart(lm, monkeypatch):
    facts = close_calls(lm)[:9]
    cache = ScoreCache("a" * 32)
    first = score_facts(lm, facts, cache=cache, two_stage=True).edit
    monkeypatch.setattr(LanguageModel, "next_token_scores", lambda *a: 1 / 0)
    again = score_facts(lm, facts, cache=ScoreCache("a" * 32), two_stage=True).edit
    assert torch.equal(first.logp_new, again.logp_new)
    assert cache.fetch_rough([], lambda missing: 1 / 0) == {}


def test_two_stages_are_the_default_and_leave_all_other_measurements_in_float32(lm):
    evaluation = Evaluation(EvaluationSettings())
    assert evaluation.settings.matmul == "two_stage"
    assert evaluation.cache(lm, "f" * 64).folder.name == "f" * 32  # float32's
    with evaluation.products(lm):
        assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
