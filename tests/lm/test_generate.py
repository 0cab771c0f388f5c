"""Tests of the generation loop against transformers' ``generate``, and against loops of full passes."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from editlab.errors import NonFiniteError, UserError
from editlab.lm import generate
from editlab.lm.generate import (
    continue_rows,
    drawn,
    end_tokens,
    first_sentence,
    greedy_continuations,
    greedy_texts,
    most_likely,
)
from editlab.lm.language_model import LanguageModel
from editlab.lm.together import continue_together
from tests.lm.conftest import lm_of
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

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


TEXTS = ["The capital of France is", "Oslo lies in", "Tove Jansson", "The currency of India is the", "Lima lies in"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("bos", [False, True])
def test_greedy_texts_are_those_of_transformers_on_a_padded_batch(family, bos):
    """Transformers pads all prompts on the left to one length; editlab pads none."""
    model = tiny_model(family)
    tokenizer = tiny_tokenizer(bos=bos, padding_side="left")
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    out = model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=14, do_sample=False)
    rows = [row[batch["input_ids"].shape[1] :].tolist() for row in out]
    expected = [row[: row.index(END)] if END in row else row for row in rows]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert continue_together(model, ids, [14] * len(ids), {END}, lambda index, new: False) == expected
    assert len({len(prompt) for prompt in ids}) > 1
    texts = greedy_texts(LanguageModel(model, tokenizer), TEXTS, 14, lambda index, text: False)
    for prompt, row, text in zip(ids, expected, texts, strict=True):
        # The model is random, so that a text may have special tokens, and letters that are cut in two.
        plain = row[: next((i for i, token in enumerate(row) if token in tokenizer.all_special_ids), len(row))]
        assert text == tokenizer.decode([*prompt, *plain]).removeprefix(tokenizer.decode(prompt)).rstrip("\ufffd")


def saying(monkeypatch, lm, texts):
    """Make the model say texts: each prompt's continuation is the given one, token for token."""
    said = {lm.encode(prompt).ids: lm.tokenizer(text, add_special_tokens=False)["input_ids"] for prompt, text in texts}
    calls = []

    def rows(model, prompts, rooms, ends, done, tick=None):
        calls.append(len(prompts))
        found = []
        for row, prompt in enumerate(prompts):
            whole = said[tuple(prompt)][: rooms[row]]
            last = next((n for n in range(1, len(whole) + 1) if done(row, whole[:n])), len(whole))
            found.append(whole[:last])
        return found

    monkeypatch.setattr(generate, "continue_together", rows)
    return calls


def test_a_continuation_is_the_first_sentence(monkeypatch):
    lm = lm_of("llama")
    texts = {
        TEXTS[0]: " Paris. The capital of Japan is Tokyo.",
        TEXTS[1]: " Norway\nand Lima",
        TEXTS[2]: "\n\nspeaks 3.5 Swedish! Is",  # line breaks before the text do not end it
        TEXTS[3]: " rupee</s> Oslo",
        TEXTS[4]: " Peru",
    }
    calls = saying(monkeypatch, lm, texts.items())
    expected = ["Paris.", "Norway", "speaks 3.5 Swedish!", "rupee", "Peru"]
    assert greedy_continuations(lm, [*TEXTS, TEXTS[0]]) == [*expected, "Paris."]
    assert sum(calls) == len(TEXTS)  # an equal prompt is run once
    assert greedy_continuations(lm, [TEXTS[4] + " "]) == ["Peru"]  # the space belongs to the continuation
    assert greedy_continuations(lm, []) == []
    with pytest.raises(UserError, match="A prompt is empty"):
        greedy_continuations(lm, ["Oslo", " "])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", ""),
        ("Paris", "Paris"),
        ("Paris.", "Paris."),
        (" Paris.\nIt", "Paris."),
        ("Paris? No!", "Paris?"),
        ("v1.2 of it. And", "v1.2 of it."),
        ("\u6771\u4eac\u3002\u305d\u308c", "\u6771\u4eac\u3002"),
    ],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first


def test_a_text_ends_where_the_model_has_no_room():
    lm = LanguageModel(tiny_model("llama", max_position_embeddings=8), tiny_tokenizer())
    room = [8 - len(lm.encode(text).ids) for text in TEXTS[:3]]
    assert min(room) < 4
    counts = [0] * 3

    def count(index, text):
        counts[index] += 1
        return False

    greedy_texts(lm, TEXTS[:3], 4, count)
    assert counts == [min(4, max(0, one)) for one in room]
