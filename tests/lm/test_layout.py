"""Packed rows against padded ones, and padded ones against a pass of each row alone."""

import pytest
import torch

from editlab.lm.language_model import LanguageModel
from editlab.lm.layout import PACKED, Packed, Padded, find_out, lay_out
from editlab.lm.past import Past, read_prefixes
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

PREFIXES = [(5, 6, 7), (8,), (), (5, 6, 7)]
TAILS = [(9, 10), (11, 12, 13, 14), (15,), (16, 17, 18)]
PLACES = torch.tensor([(r, c) for r, tail in enumerate(TAILS) for c in range(len(tail))]).T
PLAIN = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "opt"}
"""Families whose attention is the usual one, called through transformers' interface."""


def make(family, **changes):
    return LanguageModel(tiny_model(family, **changes), tiny_tokenizer())


def alone(lm, rows):
    """Logits of the tails' tokens, each row run by itself."""
    return torch.cat([lm.run(torch.tensor([PREFIXES[r] + TAILS[r]])).logits[0, len(PREFIXES[r]) :] for r in rows])


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gives_what_each_row_gives_alone(family):
    lm = make(family)
    find_out(lm)
    assert lm.packs is (family in PLAIN)
    layout = lay_out(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    assert isinstance(layout, Packed if lm.packs else Padded)
    assert torch.allclose(layout.run().logits[layout.place(*PLACES)], alone(lm, range(4)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Packed, Padded])
def test_rows_that_are_dropped_leave_the_others_as_they_were(kind):
    lm = make("llama")
    layout = kind(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    hidden = layout.run().logits
    left = layout.keep(torch.tensor([False, True, False, True]), hidden)
    places = torch.tensor([(r, c) for r, tail in enumerate([TAILS[1], TAILS[3]]) for c in range(len(tail))]).T
    expected = alone(lm, [1, 3])
    assert torch.allclose(left[layout.place(*places)], expected, atol=1e-5)
    assert torch.allclose(layout.run().logits[layout.place(*places)], expected, atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_is_kept():
    lm = make("mistral", sliding_window=2)
    assert not torch.allclose(alone(lm, [0, 3]), alone(make("mistral", sliding_window=64), [0, 3]), atol=1e-5)
    layout = Packed(lm, TAILS, read_prefixes(lm, [[prefix] for prefix in PREFIXES]))
    assert torch.allclose(layout.run().logits[layout.place(*PLACES)], alone(lm, range(4)), atol=1e-5)


def test_gradients_are_those_of_padded_rows():
    lm = make("llama")
    past = read_prefixes(lm, [[prefix] for prefix in PREFIXES])
    table = lm.model.get_input_embeddings().weight.requires_grad_(True)
    gradients = []
    for kind in (Packed, Padded):
        layout = kind(lm, TAILS, past)
        (gradient,) = torch.autograd.grad(layout.run().logits[layout.place(*PLACES)].square().sum(), table)
        gradients.append(gradient)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


def test_padding_is_not_run():
    lm = make("llama")
    assert Packed(lm, TAILS, Past.none(4)).ids.shape == (10,)
    assert Padded(lm, TAILS, Past.none(4)).ids.shape == (4, 4)


@torch.no_grad()
def test_a_wrong_attention_is_found_out(monkeypatch):
    lm = make("llama")
    monkeypatch.setattr(Packed, "attend", lambda self, module, query, *others: query.transpose(1, 2))
    find_out(lm)
    assert lm.packs is False


@torch.no_grad()
def test_the_models_own_attention_is_back_afterwards():
    lm = make("llama")
    full = lm.run(torch.tensor([PREFIXES[0]])).logits
    layout = Packed(lm, TAILS, Past.none(4))
    layout.run()
    assert lm.model.config._attn_implementation == "sdpa"
    assert torch.equal(lm.run(torch.tensor([PREFIXES[0]])).logits, full)
    lm.model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layout.run()
    assert lm.model.config._attn_implementation != PACKED
