"""Cached scores: measured once, keyed by tokens and weights, entered whole or not at all."""

import math

import pytest
import torch

from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import score_facts, score_pairs
from editlab.lm.language_model import LanguageModel
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

A, B, C = ((1, 2, 3), 1), ((1, 2, 3), 2), ((4, 5), 1)


def test_only_what_is_missing_is_measured():
    asked = []

    def find(requests):
        asked.append(list(requests))
        return [(-float(sum(ids)) / 3, start == 1) for ids, start in requests]

    first = ScoreCache("once").fetch([A, B, A], find)
    again = ScoreCache("once").fetch([C, A], find)
    assert asked == [[A, B], [C]]  # the same tokens with another start are another question
    assert first == {A: (-2.0, True), B: (-2.0, False)}
    assert again == {C: (-3.0, True), A: (-2.0, True)}  # to the last bit
    assert ScoreCache("other").fetch([A], lambda requests: [(0.0, False)]) == {A: (0.0, False)}


def test_many_at_once():
    requests = [((i, i + 1), 1) for i in range(1234)]
    cache = ScoreCache("many")
    cache.fetch(requests, lambda missing: [(float(ids[0]), True) for ids, _ in missing])
    assert cache.fetch(requests, lambda missing: 1 / 0)[requests[1000]] == (1000.0, True)


def test_the_first_score_known_stays():
    # Two runs measure the same question at once, in other groups, and round it otherwise.
    def find(missing):
        ScoreCache("race").fetch([A], lambda also_missing: [(1.0, True)])
        return [(2.0, True)]

    ScoreCache("race").fetch([A], find)
    assert ScoreCache("race").fetch([A], lambda missing: 1 / 0) == {A: (1.0, True)}


def test_a_failure_enters_nothing():
    with pytest.raises(ZeroDivisionError):
        ScoreCache("failed").fetch([A], lambda missing: 1 / 0)
    assert ScoreCache("failed").fetch([A], lambda missing: [(3.0, False)]) == {A: (3.0, False)}


def test_what_is_no_number_is_not_kept():
    scores = ScoreCache("nan").fetch([A], lambda missing: [(float("nan"), False)])
    assert math.isnan(scores[A][0])
    assert ScoreCache("nan").fetch([A], lambda missing: [(-1.0, True)]) == {A: (-1.0, True)}


def test_what_autocast_gives_is_kept_for_itself():
    cache = ScoreCache("cast")
    cache.fetch([A], lambda missing: [(1.0, True)])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert cache.fetch([A], lambda missing: [(2.0, True)]) == {A: (2.0, True)}
    assert cache.fetch([A], lambda missing: 1 / 0) == {A: (1.0, True)}


def test_answers_to_the_same_prompts_are_kept_together():
    asked = [("Paris is in", [1, 2]), ("Rome is in", [3])]
    cache = ScoreCache("said")
    assert cache.answers(asked, 4, {0}, lambda: ["France.", "Ítaly"]) == ["France.", "Ítaly"]
    assert ScoreCache("said").answers(asked, 4, {0}, lambda: 1 / 0) == ["France.", "Ítaly"]
    other_ids = [("Paris is in", [1, 2]), ("Rome is in", [4])]  # as another chat template gives them
    for prompts, tokens, ends in ((asked[:1], 4, {0}), (asked, 5, {0}), (other_ids, 4, {0}), (asked, 4, {0, 2})):
        assert cache.answers(prompts, tokens, ends, lambda: ["other"]) == ["other"]
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.answers(asked, 4, {0}, lambda: ["cast", ""]) == ["cast", ""]


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_flipped_byte_never_yields_a_wrong_score(where, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))
    ScoreCache("flipped").fetch([A, B], lambda missing: [(-1.25, True), (-2.5, False)])
    (path,) = ScoreCache("flipped").folder.iterdir()
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    again = ScoreCache("flipped").fetch([A, B], lambda missing: [(-1.25, True), (-2.5, False)])
    assert again == {A: (-1.25, True), B: (-2.5, False)}
    assert f"{path} is damaged" in caplog.text


def test_a_models_scores_through_the_cache_are_its_scores():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    plain = score_facts(lm, FACTS[:4])
    for _ in range(2):
        cached = score_facts(lm, FACTS[:4], cache=ScoreCache("model"))
        for group in ("edit", "paraphrases", "neighbors"):
            a, b = getattr(plain, group), getattr(cached, group)
            assert a.logp_new.tolist() == b.logp_new.tolist()
            assert a.hit_true.tolist() == b.hit_true.tolist()
    lm.model = None  # nothing is left to run
    pairs = [(FACTS[0].question, FACTS[0].target_new)]
    assert score_pairs(lm, pairs, ScoreCache("model"))[0].tolist() == plain.edit.logp_new[:1].tolist()
