"""Scores against one full pass per prompt and continuation, with the softmax of all logits in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from editlab.data.fact import Fact, Neighbor
from editlab.errors import UserError
from editlab.evaluation.scoring import prefers_truth, score_facts, score_pairs, token_log_probs
from editlab.lm.language_model import LanguageModel
from editlab.metrics import EditMetrics
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = [
    Fact(
        "France", "The capital of {} is", "Tokyo", "Paris",
        paraphrases=("Where the king of France lives, in", "France is ruled from"),
        neighbors=(Neighbor("The capital of Japan is", "Tokyo"), Neighbor("The capital of Peru is", "Lima")),
    ),
    Fact("Tove Jansson", "The mother tongue of {} is", "Brazilian Portuguese"),  # the data set names no truth
    Fact("Oslo", "{} lies in", "Peru", "Norway", paraphrases=("One finds Oslo in",)),
]  # fmt: skip


@functools.cache
def lm_of(family: str, bos: bool = False) -> LanguageModel:
    return LanguageModel(tiny_model(family), tiny_tokenizer(bos=bos))


@pytest.fixture
def lm():
    return lm_of("llama")


@pytest.fixture
def rows(monkeypatch):
    """Record the rows that are scored."""
    seen: list[tuple[int, ...]] = []
    score = LanguageModel.next_token_scores

    def noted(self, rows, wanted):
        seen.extend(map(tuple, rows))
        return score(self, rows, wanted)

    monkeypatch.setattr(LanguageModel, "next_token_scores", noted)
    return seen


@torch.no_grad()
def naive(lm: LanguageModel, prompt: str, continuation: str) -> tuple[float, bool]:
    """Score one continuation: in these tests' texts its tokens are those beyond the prompt's own number."""
    before = len(lm.tokenizer(prompt)["input_ids"])
    ids = lm.tokenizer(f"{prompt} {continuation}")["input_ids"]
    table = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
    places = range(before, len(ids))
    hit = all(int(table[p - 1].argmax()) == ids[p] for p in places)
    return sum(float(table[p - 1, ids[p]]) for p in places) / len(places), hit


PAIRS = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "Tokyo"),
    ("Q", "Zyzzx the 3rd"),  # many tokens
    ("The capital of France is", "Paris"),  # again
    ("The capital of France", "is Paris and so on"),  # a row that begins as the first one does
    ("東京 lies in", "日本"),
]


@pytest.mark.parametrize(("family", "bos"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", True)])
def test_score_pairs_equals_a_naive_loop(family, bos):
    lm = lm_of(family, bos)
    logp, hit = score_pairs(lm, PAIRS)
    expected = [naive(lm, *pair) for pair in PAIRS]
    assert (logp.dtype, hit.dtype) == (torch.float32, torch.bool)
    torch.testing.assert_close(logp.double(), torch.tensor([e for e, _ in expected]).double(), rtol=0, atol=1e-4)
    assert hit.tolist() == [h for _, h in expected]


def test_a_hit_needs_every_token():
    """A model whose head's bias makes one token the argmax everywhere hits runs of that token alone."""
    lm = LanguageModel(tiny_model("phi"), tiny_tokenizer())
    (token,) = lm.tokenizer(" is")["input_ids"]
    with torch.no_grad():
        lm.model.lm_head.bias[token] = 100.0
    hit = score_pairs(lm, [("Q", "is"), ("Q", "is is is"), ("Q", "is is b"), ("Q", "b is is")])[1]
    assert hit.tolist() == [True, True, False, False]


def test_both_continuations_and_repeated_prompts_share_rows(lm, rows):
    """One row each time: repeated pairs, rows that begin alike, and one-token continuations of a prompt."""
    score_pairs(lm, [PAIRS[0]] * 5)
    assert len(rows) == 1
    rows.clear()
    # The longer row begins with the shorter one's tokens, so it serves both.
    score_pairs(
        lm,
        [("The capital of", "France"), ("The capital of", "France is Paris"), ("The", "capital of France")],
    )
    assert len(rows) == 1
    rows.clear()
    # Continuations of one token each are all read off the prompt's last position.
    one_token = [w for w in ("the", "of", "is", "in", "lies") if len(lm.tokenizer(" " + w)["input_ids"]) == 1]
    assert len(one_token) >= 3
    score_pairs(lm, [("The capital", word) for word in one_token])
    assert len(rows) == 1


def test_rows_that_part_are_all_run(lm, rows):
    """Nothing is shared where neither begins the other."""
    score_pairs(lm, [("The capital of Japan", "is Tokyo"), ("The capital of Peru", "is Lima")])
    assert len(rows) == 2


def test_order_and_company_of_pairs_play_no_part(lm):
    forth, _ = score_pairs(lm, PAIRS)
    back, _ = score_pairs(lm, PAIRS[::-1])
    alone = torch.cat([score_pairs(lm, [pair])[0] for pair in PAIRS])
    torch.testing.assert_close(forth, back.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(forth, alone, rtol=0, atol=1e-5)


def test_no_pairs_give_no_scores(lm):
    logp, hit = score_pairs(lm, [])
    assert logp.shape == hit.shape == (0,)
    assert (logp.dtype, hit.dtype) == (torch.float32, torch.bool)


@pytest.mark.parametrize("pair", [("The capital is", " "), ("", "Paris")])
def test_pairs_without_text_are_the_users_error(lm, pair):
    with pytest.raises(UserError, match="target"):
        score_pairs(lm, [*PAIRS, pair])


# score_facts


def check(lm, got, expected):
    """Compare one group with rows (record, prompt, new, true), scored one by one."""
    assert got.record.tolist() == [record for record, *_ in expected]
    for i, (_, prompt, new, true) in enumerate(expected):
        logp, hit = naive(lm, prompt, new)
        assert float(got.logp_new[i]) == pytest.approx(logp, abs=1e-4)
        assert bool(got.hit_new[i]) is hit
        if true is None:
            assert math.isnan(got.logp_true[i])
            assert not got.hit_true[i]
        else:
            logp, hit = naive(lm, prompt, true)
            assert float(got.logp_true[i]) == pytest.approx(logp, abs=1e-4)
            assert bool(got.hit_true[i]) is hit


@pytest.mark.parametrize("first_record", [0, 7])
def test_score_facts_equals_a_naive_loop(lm, first_record):
    """The rows are written out by hand; a neighbor's truth is its own and not the fact's."""
    a, b, c = range(first_record, first_record + 3)
    scores = score_facts(lm, FACTS, first_record=first_record)
    check(
        lm,
        scores.edit,
        [
            (a, "The capital of France is", "Tokyo", "Paris"),
            (b, "The mother tongue of Tove Jansson is", "Brazilian Portuguese", None),
            (c, "Oslo lies in", "Peru", "Norway"),
        ],
    )
    check(
        lm,
        scores.paraphrases,
        [
            (a, "Where the king of France lives, in", "Tokyo", "Paris"),
            (a, "France is ruled from", "Tokyo", "Paris"),
            (c, "One finds Oslo in", "Peru", "Norway"),
        ],
    )
    check(
        lm,
        scores.neighbors,
        [(a, "The capital of Japan is", "Tokyo", "Tokyo"), (a, "The capital of Peru is", "Tokyo", "Lima")],
    )


def test_groups_that_are_not_asked_for_or_not_there_are_none(lm, rows):
    scores = score_facts(lm, FACTS, paraphrases=False, neighbors=0)
    assert scores.paraphrases is None
    assert scores.neighbors is None
    tokenized = [tuple(lm.tokenizer(p)["input_ids"]) for p in FACTS[0].paraphrases]
    assert not any(row[: len(p)] == p for p in tokenized for row in rows)  # and they were not run
    bare = score_facts(lm, [FACTS[1]])
    assert bare.paraphrases is None
    assert bare.neighbors is None


def test_no_facts_give_empty_scores(lm):
    scores = score_facts(lm, [])
    assert len(scores.edit) == 0
    assert scores.paraphrases is None


def test_all_facts_without_truth_have_no_true_score(lm):
    scores = score_facts(lm, [FACTS[1], FACTS[1]])
    assert scores.edit.logp_true.isnan().all()
    assert scores.edit.logp_new.isfinite().all()


def broken(lm, layer=1):
    """The model with a weight that is no number, so that it answers nothing with a number."""
    with torch.no_grad():
        lm.anatomy.edit_module(layer).weight[0, 0] = math.nan
    return lm


def test_a_model_without_an_answer_misses_everything():
    """Whatever torch makes the argmax of a row of NaN; truths that no one knows stay unknown."""
    lm = broken(LanguageModel(tiny_model("llama"), tiny_tokenizer()))
    scores = score_facts(lm, FACTS)
    for group in (scores.edit, scores.paraphrases, scores.neighbors):
        assert (group.logp_new == -math.inf).all()
        assert not group.hit_new.any()
        assert not group.hit_true.any()
    assert scores.edit.logp_true.isnan().tolist() == [False, True, False]
    metrics = EditMetrics()
    metrics.update(edit=scores.edit, paraphrases=scores.paraphrases, neighbors=scores.neighbors)
    names = {"ES", "PS", "NS", "S", "accuracy", "paraphrase_accuracy", "neighbor_accuracy"}
    magnitudes = {"ES_magnitude", "PS_magnitude", "NS_magnitude"}
    assert {name: float(value) for name, value in metrics.compute().items()} == dict.fromkeys(names | magnitudes, 0.0)
    assert prefers_truth(lm, FACTS) == [False] * 3


@pytest.mark.parametrize("lost", ["Tokyo", "Paris"])
def test_one_answer_that_is_no_number_is_a_miss_of_its_prompt(lm, monkeypatch, lost):
    """Whichever of the two it is; the other prompt counts as before: 1 of 2 took, and not 1 of 1."""
    monkeypatch.setattr("editlab.evaluation.scoring.score_pairs", lambda lm, pairs, cache, compared: (
        torch.tensor([math.nan if lost in pair[1] else -1.0 - (pair[1] == "Norway") for pair in pairs]),
        torch.ones(len(pairs), dtype=torch.bool),
    ))  # fmt: skip
    metrics = EditMetrics()
    metrics.update(edit=score_facts(lm, [FACTS[0], FACTS[2]]).edit, paraphrases=None, neighbors=None)
    found = metrics.compute()
    assert (float(found["ES"]), float(found["accuracy"])) == (0.5, 0.5)


def test_prefers_truth_compares_the_two(lm):
    """Against the naive scores; with new and true exchanged the answer is the opposite."""
    fact = FACTS[0]
    swapped = Fact(fact.subject, fact.prompt, fact.target_true, fact.target_new)
    expected = naive(lm, fact.question, "Paris")[0] > naive(lm, fact.question, "Tokyo")[0]
    assert prefers_truth(lm, [fact, swapped, FACTS[1]]) == [expected, not expected, False]


# token_log_probs


@pytest.mark.parametrize(("length", "window"), [(100, 32), (96, 32), (97, 32), (20, 32), (300, 16)])
def test_token_log_probs_equals_a_naive_loop(lm, length, window):
    """Each window alone, all tokens but its first; a last window of a single token has nothing to give."""
    ids = torch.randint(3, 390, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = []
    with torch.no_grad():
        for start in range(0, length, window):
            part = ids[start : start + window]
            table = lm.model(input_ids=torch.tensor([part])).logits[0].double().log_softmax(1)
            expected += [float(table[p - 1, part[p]]) for p in range(1, len(part))]
    got = token_log_probs(lm, ids, window)
    assert got.dtype == torch.float32
    assert len(got) == length - math.ceil(length / window)
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_no_window_is_longer_than_what_the_model_takes():
    lm = lm_of("gpt2")  # of 128 positions
    ids = torch.randint(3, 390, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(token_log_probs(lm, ids), token_log_probs(lm, ids, 128))


@pytest.mark.parametrize("ids", [[], [5]])
def test_too_short_a_text_has_no_token_log_probs(lm, ids):
    assert token_log_probs(lm, ids).shape == (0,)
