"""Sampled contexts: their number and form, their dependence on the seed, and the global random state."""

from __future__ import annotations

import random

import pytest
import torch

from editlab.errors import UserError
from editlab.keys.contexts import OPENINGS, ContextSettings, sample_contexts
from editlab.lm.language_model import LanguageModel
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def lm(request):
    return LanguageModel(tiny_model("gpt2"), tiny_tokenizer(bos=request.param))


def test_the_empty_context_comes_first_and_openings_alternate(lm):
    contexts = sample_contexts(lm, ContextSettings(count=7, length=4))
    assert contexts[0] == ""
    assert len(contexts) == 8
    for i, context in enumerate(contexts[1:]):
        assert context.startswith(OPENINGS[i % 5])


def test_contexts_end_as_sentences_on_one_line(lm):
    """A question follows directly: one full stop and one space, no line breaks, no special tokens."""
    for context in sample_contexts(lm, ContextSettings(count=5, length=20))[1:]:
        assert context.endswith(". ")
        assert not context.endswith(".. ")
        assert " ".join(context.split()) + " " == context
        assert "<s>" not in context


def test_length_counts_the_sampled_tokens(lm, monkeypatch):
    asked = []
    sample = LanguageModel.sample

    def noted(self, prompts, new_tokens, seed, greedy=False):
        asked.append((len(prompts), new_tokens, seed))
        return sample(self, prompts, new_tokens, seed, greedy)

    monkeypatch.setattr(LanguageModel, "sample", noted)
    sample_contexts(lm, ContextSettings(count=3, length=6, seed=40))
    assert [(n, tokens) for n, tokens, _ in asked] == [(1, 6)] * 3
    assert len({seed for *_, seed in asked}) == 3  # no two with the same opening can be alike


def test_the_same_seed_gives_the_same_contexts_whatever_was_drawn_before(lm):
    settings = ContextSettings(count=3, length=8, seed=1)
    torch.manual_seed(5)
    first = sample_contexts(lm, settings)
    torch.rand(3)
    assert sample_contexts(lm, settings) == first
    assert sample_contexts(lm, ContextSettings(count=3, length=8, seed=2)) != first


def test_the_global_random_state_is_untouched(lm):
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate()
    sample_contexts(lm, ContextSettings(count=2, length=3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_no_contexts_but_the_empty_one(lm):
    assert sample_contexts(lm, ContextSettings(count=0)) == [""]


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"count": -1}, "count is -1: it must not be negative"), ({"length": 0}, "length is 0: it must be at least 1")],
)
def test_impossible_settings_are_the_users_error(bad, message):
    with pytest.raises(UserError, match=rf"model\.contexts\.{message}"):
        ContextSettings(**bad)
