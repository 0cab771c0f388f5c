"""Tests of packed rows against padded rows, and of padded rows against a separate pass for each row."""

import pytest
import torch
import transformers

from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.lm.packing import PACKED, Merged, Packed, Padded, lay_out, lay_out_whole, pads_between
from editlab.lm.prefix_cache import PrefixCache, read_prefixes
from tests.tiny import FAMILIES, OTHERS, tiny_model, tiny_tokenizer

PREFIXES = [(5, 6, 7), (8,), (), (5, 6, 7)]
TAILS = [(9, 10), (11, 12, 13, 14), (15,), (16, 17, 18)]
INDICES = torch.tensor([(r, c) for r, tail in enumerate(TAILS) for c in range(len(tail))]).T
PLAIN = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "opt"}
"""Families with standard attention, called through transformers' interface."""


def make(family, **changes):
    return LanguageModel(tiny_model(family, **changes), tiny_tokenizer())


def alone(lm, rows):
    """Return the logits of the tails' tokens, with a separate pass for each row."""
    return torch.cat([lm.run(torch.tensor([PREFIXES[r] + TAILS[r]])).logits[0, len(PREFIXES[r]) :] for r in rows])


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gives_the_logits_of_separate_rows(family):
    lm = make(family)
    assert lm.packs or family not in PLAIN  # newer transformers give more families standard attention
    layout = lay_out(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    assert isinstance(layout, Packed if lm.packs else Padded)
    assert torch.allclose(layout.run().logits[layout.locate(*INDICES)], alone(lm, range(4)), atol=1e-5)


ROWS = [(5, 6, 7), (5, 6, 7, 8), (5, 9), (4,), (5, 6, 7)]
"""Six different beginnings: 4, 5, 5 6, 5 9, 5 6 7, 5 6 7 8."""


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_with_common_beginnings_give_the_logits_of_separate_rows(family):
    lm = make(family)
    layout = lay_out_whole(lm, ROWS)
    assert isinstance(layout, Merged if lm.packs else Padded)
    logits = layout.run().logits
    for r, row in enumerate(ROWS):
        at = layout.locate(torch.full((len(row),), r), torch.arange(len(row)))
        assert torch.allclose(logits[at], lm.run(torch.tensor([row])).logits[0], atol=1e-5)


def test_a_common_beginning_is_run_once():
    lm = make("llama")
    layout = Merged(lm, ROWS)
    assert sorted(zip(layout.positions.tolist(), layout.ids.tolist(), strict=True)) == [
        (0, 4), (0, 5), (1, 6), (1, 9), (2, 7), (3, 8),
    ]  # fmt: skip
    assert torch.equal(
        layout.locate(torch.tensor([0]), torch.tensor([2]))[1], layout.locate(torch.tensor([4]), torch.tensor([2]))[1]
    )


@torch.no_grad()
def test_a_sliding_window_holds_for_rows_with_common_beginnings():
    lm = make("mistral", sliding_window=2)
    layout = Merged(lm, ROWS)
    last = layout.locate(torch.tensor([1]), torch.tensor([3]))
    expected = lm.run(torch.tensor([ROWS[1]])).logits[0, 3:]
    assert torch.allclose(layout.run().logits[last], expected, atol=1e-5)
    wider = make("mistral", sliding_window=64).run(torch.tensor([ROWS[1]])).logits[0, 3:]
    assert not torch.allclose(expected, wider, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Packed, Padded])
def test_dropping_rows_does_not_change_the_other_rows(kind):
    lm = make("llama")
    layout = kind(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    hidden = layout.run().logits
    left = layout.keep(torch.tensor([False, True, False, True]), hidden)
    indices = torch.tensor([(r, c) for r, tail in enumerate([TAILS[1], TAILS[3]]) for c in range(len(tail))]).T
    expected = alone(lm, [1, 3])
    assert torch.allclose(left[layout.locate(*indices)], expected, atol=1e-5)
    assert torch.allclose(layout.run().logits[layout.locate(*indices)], expected, atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_holds_for_packed_rows():
    lm = make("mistral", sliding_window=2)
    assert not torch.allclose(alone(lm, [0, 3]), alone(make("mistral", sliding_window=64), [0, 3]), atol=1e-5)
    layout = Packed(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    assert torch.allclose(layout.run().logits[layout.locate(*INDICES)], alone(lm, range(4)), atol=1e-5)


def test_gradients_are_those_of_padded_rows():
    lm = make("llama")
    cache = read_prefixes(lm, [[prefix] for prefix in PREFIXES])
    table = lm.model.get_input_embeddings().weight.requires_grad_(True)
    gradients = []
    for kind in (Packed, Padded):
        layout = kind(lm, TAILS, cache)
        (gradient,) = torch.autograd.grad(layout.run().logits[layout.locate(*INDICES)].square().sum(), table)
        gradients.append(gradient)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_padding_inside_a_row_does_not_change_the_logits(family, dtype):
    assert pads_between(LanguageModel(tiny_model(family).to(dtype), tiny_tokenizer()))


def test_a_model_that_counts_padding_as_distance_is_rejected():
    torch.manual_seed(0)
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=4, vocab_size=400, max_seq_len=128)
    with pytest.raises(UserError, match="MptForCausalLM counts padding in the distance between two tokens"):
        LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer())


def test_padding_is_not_run():
    lm = make("llama")
    assert Packed(lm, TAILS, PrefixCache.empty(4)).ids.shape == (10,)
    assert Padded(lm, TAILS, PrefixCache.empty(4)).ids.shape == (4, 4)


@torch.no_grad()
def test_a_wrong_attention_is_detected(monkeypatch):
    monkeypatch.setattr(Packed, "attend", lambda self, module, query, *others: query.transpose(1, 2))
    assert make("llama").packs is False


@torch.no_grad()
def test_the_models_own_attention_is_restored():
    lm = make("llama")
    full = lm.run(torch.tensor([PREFIXES[0]])).logits
    layout = Packed(lm, TAILS, PrefixCache.empty(4))
    layout.run()
    assert lm.model.config._attn_implementation == "sdpa"
    assert torch.equal(lm.run(torch.tensor([PREFIXES[0]])).logits, full)
    lm.model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layout.run()
    assert lm.model.config._attn_implementation != PACKED
