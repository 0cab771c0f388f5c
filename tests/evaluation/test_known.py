"""Tests of which facts a model knows: rules judged by hand, and the built-in model against transformers alone."""

from __future__ import annotations

import re
import string

import pytest
import torch
from transformers import GenerationConfig

from editlab.data.fact import Fact
from editlab.data.files import read_facts
from editlab.evaluation import known
from editlab.evaluation.known import Held, begins_with, count_held, knows_truth, normalized, truths_of
from editlab.evaluation.scoring import prefers_truth
from editlab.lm.language_model import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "answer", "begins"),
    [
        (" Paris.", "Paris", True),
        ("paris, the capital", "Paris", True),
        (" the Paris", "Paris", True),
        (" the U.S. dollar", "US dollar", False),  # other letters stand between
        ("Parisian", "Paris", False),  # not at the end of a word
        ("Paris's", "Paris", True),
        (" in Paris", "Paris", False),  # not at the beginning
        ("Saint Petersburg", "St. Petersburg", False),
        ("St. Petersburg", "St Petersburg", True),
        ("Guinea-Bissau", "Guinea", True),
        ("", "Paris", False),
        ("\u6771\u4eac\u3067\u3059", "\u6771\u4eac", True),  # no visible end of a word
        ("Co\u0302te", "C\u00f4te", True),
    ],
)
def test_a_text_begins_with_an_answer(text, answer, begins):
    assert begins_with(normalized(text), normalized(answer)) is begins


def test_truths_have_letters():
    assert truths_of(Fact("a", "{} is", "b", "The U.K.", truth_aliases=("...", "Britain"))) == ["u k", "britain"]
    assert truths_of(Fact("a", "{} is", "b")) == []


PROMPTS = ["{} is", "The capital of {} is", "{} lies in", "The currency of {} is the"]


@pytest.fixture(scope="module")
def lm():
    """A tiny model that says words of ASCII letters, and the end of the text."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    texts = [lm.tokenizer.decode([token]) for token in range(lm.embeddings)]
    spoken = torch.tensor([bool(re.fullmatch(r" ?[a-zA-Z]+|</s>", text)) for text in texts])
    lm.model.lm_head.register_forward_hook(lambda module, args, logits: logits - 1e4 * ~spoken)
    return lm


@pytest.fixture(scope="module")
def facts(lm):
    """Facts whose truth is what the tiny model says next, and as many whose truth it is not."""
    found = []
    for subject in ("Oslo", "Lima", "France", "Tove Jansson"):
        for prompt in PROMPTS:
            text = said(lm, Fact(subject, prompt, "x"), 12)
            words = re.findall(r"\w+", text.casefold())
            if words:
                found += [Fact(subject, prompt, "Peru", " ".join(words[:n])) for n in (1, 2) if n < len(words)]
                found.append(Fact(subject, prompt, "Peru", words[0] + "x"))
    return found


def said(lm, fact, tokens):
    """Return the greedy continuation of an edit prompt by transformers' generate."""
    ids = torch.tensor([lm.tokenizer(fact.question)["input_ids"]])
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=lm.tokenizer.eos_token_id)
    out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    new = out[ids.shape[1] :]
    special = set(lm.tokenizer.all_special_ids)
    plain = new[: next((i for i, token in enumerate(new) if token in special), len(new))]
    return lm.tokenizer.decode([*ids[0].tolist(), *plain]).removeprefix(lm.tokenizer.decode(ids[0].tolist()))


def says_the_truth(text, fact):
    """Tell whether a text begins with a fact's truth, by rules written again: SQuAD's, at the beginning."""

    def plain(some):
        words = "".join(" " if c in string.punctuation and c != "_" else c for c in some.casefold()).split()
        return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words

    truth = plain(fact.target_true)
    return plain(text)[: len(truth)] == truth


def test_known_facts_are_those_whose_truth_generate_says(lm, facts):
    """An early end of a continuation does not change the result."""
    expected = [says_the_truth(said(lm, fact, known.MOST_TOKENS), fact) for fact in facts]
    assert knows_truth(lm, facts) == expected
    assert set(expected) == {True, False}


@pytest.mark.parametrize(
    ("tokens", "truth", "holds"),
    [
        ([" the", " United", " States", ",", " which"], "United States", True),
        ([" a", " phys", "icist", " and"], "physicist", True),
        ([" the", " Euro", "peans", "."], "Euro", False),  # the truth is not a whole word of it
        ([" the", " Nether", "lands", ","], "the Netherlands", True),
    ],
)
def test_an_article_alone_decides_nothing(tokens, truth, holds, monkeypatch):
    def scripted(lm, prompts, most, done, tick=None):
        text = ""
        for token in tokens:
            text += token
            if done(0, text):
                break
        return [text]

    monkeypatch.setattr(known, "greedy_texts", scripted)
    assert knows_truth(None, [Fact("X", "{} is in", "Y", truth)]) == [holds]


def test_an_alias_counts_and_a_fact_without_a_truth_is_not_known(lm, facts):
    fact = next(f for f, held in zip(facts, knows_truth(lm, facts), strict=True) if held)
    alias = Fact(fact.subject, fact.prompt, "Peru", "zzz", truth_aliases=(fact.target_true,))
    assert knows_truth(lm, [Fact("Oslo", "{} is", "x"), alias, fact]) == [False, True, True]
    assert knows_truth(lm, []) == []


def test_counts_agree_with_the_single_facts(lm, facts, monkeypatch, tmp_path):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(known, "CHUNK", 3)
    found = count_held(lm, [*facts, Fact("Oslo", "{} is", "x")])
    assert found == (len(facts), sum(prefers_truth(lm, facts)), sum(knows_truth(lm, facts)))
    assert str(Held(8, 6, 2)) == "prefers the truth of 6 of 8 facts (75.0%) and knows 2 (25.0%)"


@pytest.mark.real
@pytest.mark.thorough
def test_the_built_in_facts_are_known_by_transformers_alone():
    """The model's own generate, one prompt at a time, says the truth of each of the first 50 built-in facts."""
    lm = LanguageModel.from_name("smollm2-135m", torch.float32)
    facts = read_facts("worldfacts")[:50]
    assert [fact.question for fact in facts if not says_the_truth(said(lm, fact, 8), fact)] == []
    assert knows_truth(lm, facts) == [True] * 50
