"""Tests of the generation loop against transformers' ``generate``, and against loops of full passes."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from editlab.errors import NonFiniteError
from editlab.lm import generate
from editlab.lm.generate import continue_greedily, continue_rows, drawn, end_tokens, most_likely
from tests.tiny import FAMILIES, tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10]]
END = 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pick", [most_likely, drawn])
def test_tokens_are_those_of_transformers_generate(family, pick):
    """Sampled tokens agree too: the same generator is used for the same probabilities in the same order."""
    model = tiny_model(family)
    ids = torch.tensor(PROMPTS)
    model.generation_config = GenerationConfig(eos_token_id=END)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if pick is drawn else {}
    torch.manual_seed(3)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
        logits_processor=LogitsProcessorList(), **sampling,
    )  # fmt: skip
    torch.manual_seed(3)
    assert continue_rows(model, PROMPTS, 12, pick) == expected[:, 3:].tolist()


def test_each_token_takes_one_pass_over_the_new_token_only(monkeypatch):
    """The KV cache holds the earlier tokens, and logits are computed at the last token only."""
    model = tiny_model("llama")
    read, heads = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(args[0].shape))
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[1]))
    continue_rows(model, PROMPTS, 4)
    assert read == [(2, 3), (2, 1), (2, 1), (2, 1)]
    assert heads == [1, 1, 1, 1]


@torch.no_grad()
def greedy(model, prompt, new_tokens):
    """Return the most likely tokens by full passes, up to the end-of-text token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def ending(after):
    """Return a model that ends its text after a given token, where the end-of-text token has a high logit."""
    model = tiny_model("llama")
    embedding = model.model.embed_tokens.weight
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + boost())
    seen = {}
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.update(last=args[0][:, -1]))

    def boost():
        more = torch.zeros(len(seen["last"]), 1, embedding.shape[0])
        more[seen["last"] == after, :, END] = 100.0
        return more

    return model


def test_a_text_stops_at_the_end_of_text_token():
    prompt = [5, 6, 7]
    text = greedy(tiny_model("llama"), prompt, 10)
    model = ending(text[3])
    expected = text[: text.index(text[3]) + 1]
    assert continue_rows(model, [prompt], 10, stop=True) == [expected] == [greedy(model, prompt, 10)]
    assert len(continue_rows(model, [prompt], 10)[0]) == 10  # without stop, the end is never generated
    assert END not in continue_rows(model, [prompt], 10)[0]


def test_rows_stop_separately_and_the_loop_with_the_last():
    prompts = [[5, 6, 7], [8, 9, 10], [3, 4, 11]]
    texts = [greedy(tiny_model("llama"), prompt, 12) for prompt in prompts]
    model = ending(texts[0][1])
    steps = []
    found = continue_rows(model, prompts, 12, stop=True, tick=steps.append)
    assert found == [greedy(model, prompt, 12) for prompt in prompts]
    assert len({len(row) for row in found}) > 1
    assert len(steps) == min(12, max(map(len, found)) + 1)
    assert set(steps) == {3}


def test_prompts_of_any_lengths_give_the_texts_of_separate_prompts(monkeypatch):
    monkeypatch.setattr(generate, "ROWS", 2)
    model = tiny_model("gpt2")
    prompts = [[5, 6, 7], [8], [9, 10, 11], [12], [13, 14], [15, 16, 17]]
    groups = []
    found = continue_greedily(model, prompts, 6, stop=True, tick=groups.append)
    assert found == [greedy(model, prompt, 6) for prompt in prompts]
    assert groups == [2, 1, 2, 1]
    assert continue_greedily(model, [], 6) == []


def test_no_tokens_and_no_end():
    model = tiny_model("llama")
    assert continue_rows(model, PROMPTS, 0) == [[], []]
    for given, expected in (([2, 3], {2, 3}), (2, {2}), (None, set())):
        model.generation_config.eos_token_id = given
        assert end_tokens(model) == expected
    assert [len(row) for row in continue_rows(model, PROMPTS, 5, stop=True)] == [5, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_token_is_drawn_from_non_finite_logits(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(NonFiniteError, match="logits are not finite, so no text can be drawn"):
        drawn(logits)
    logits[1, 3] = -torch.inf  # a token that is excluded
    torch.manual_seed(0)
    assert all(int(drawn(logits)[1]) != 3 for _ in range(50))
