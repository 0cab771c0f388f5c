"""Tests that partial runs give the logits of the full model, run fewer modules, and leave the model unchanged."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

from editlab.lm.forward import (
    adding,
    cache_in,
    hidden_of,
    logits_only_at,
    reading,
    replace_hidden,
    starting_at,
    with_cache,
)
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import pad
from tests.lm.conftest import lm_of
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 4
"""Blocks of every tiny model."""
IDS, MASK = pad([[11, 42, 7, 99, 180], [5, 250, 31]], left=True)
ROWS, COLUMNS = torch.tensor([0, 0, 1, 1]), torch.tensor([4, 1, 3, 4])
"""Tokens whose logits are computed; padding is on the left, so columns 2 to 4 are row 1's tokens."""


def traces(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    """Count each module's hooks and whether it has its own ``forward``, which a partial run could leave behind."""
    return {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in model.named_modules()
    }


def block_inputs(lm: LanguageModel) -> list[torch.Tensor]:
    """Record the hidden state before each block, and after the last, by plain hooks on a full pass."""
    states: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for b in lm.anatomy.blocks
    ]

    def note(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    handles.append(lm.anatomy.blocks[0].register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        lm.run(IDS, MASK)
    for handle in handles:
        handle.remove()
    return states


def test_the_check_itself_detects_traces():
    """The check used below detects hooks of both kinds and a replaced forward."""
    model = nn.Sequential(nn.Linear(1, 1))
    clean = traces(model)
    handle = model[0].register_forward_hook(lambda *a: None)
    assert traces(model) != clean
    handle.remove()
    model[0].forward = lambda x: x
    assert traces(model) != clean


# starting_at with logits_only_at


@torch.no_grad()
@pytest.mark.parametrize("first", range(LAYERS + 1))
def test_upper_blocks_alone_give_the_full_models_logits(lm, first):
    """Equal up to the rounding of a smaller product; ``first = 4`` runs the final norm and the head only."""
    assert len(lm.anatomy.blocks) == LAYERS
    full = lm.run(IDS, MASK).logits
    states = block_inputs(lm)
    clean = traces(lm.model)
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i in range(LAYERS)
        for module in [lm.anatomy.edit_module(i)]
    ]
    with (
        starting_at(lm.anatomy.blocks, first, states[first], lm.blocks_give_tuples),
        logits_only_at(lm.anatomy.head, ROWS, COLUMNS),
    ):
        got = lm.run(IDS, MASK).logits
    for handle in handles:
        handle.remove()
    assert got.shape == (1, len(ROWS), full.shape[-1])
    torch.testing.assert_close(got[0], full[ROWS, COLUMNS], rtol=1e-5, atol=1e-6)
    assert ran == list(range(first, LAYERS))
    assert traces(lm.model) == clean


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 2, LAYERS])
def test_the_given_hidden_state_is_used(lm, first):
    """Other hidden states give other logits, so the test above does not pass by accident."""
    full = lm.run(IDS, MASK).logits
    states = block_inputs(lm)
    with starting_at(lm.anatomy.blocks, first, states[first].flip(-1), lm.blocks_give_tuples):
        assert not torch.allclose(lm.run(IDS, MASK).logits, full, atol=1e-2)
    assert torch.equal(lm.run(IDS, MASK).logits, full)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 2, LAYERS])
def test_an_exception_leaves_the_model_unchanged(lm, first):
    full = lm.run(IDS, MASK).logits
    clean = traces(lm.model)
    hidden = block_inputs(lm)[0]
    block = lm.anatomy.blocks[1]
    with (
        pytest.raises(ZeroDivisionError),
        starting_at(lm.anatomy.blocks, first, hidden, lm.blocks_give_tuples),
        logits_only_at(lm.anatomy.head, ROWS, COLUMNS),
        adding(block, (torch.zeros(1), torch.zeros(1)), torch.ones(1), 2),
        reading({"a": (block, "input"), "b": (block, "output")}),
    ):
        raise ZeroDivisionError
    assert traces(lm.model) == clean
    assert torch.equal(lm.run(IDS, MASK).logits, full)


@torch.no_grad()
def test_a_failure_inside_the_model_leaves_it_unchanged():
    lm = lm_of("llama")
    clean = traces(lm.model)
    states = block_inputs(lm)
    with (
        pytest.raises(RuntimeError),
        starting_at(lm.anatomy.blocks, 2, states[2][..., :-1], lm.blocks_give_tuples),  # one feature short
    ):
        lm.run(IDS, MASK)
    assert traces(lm.model) == clean


def test_a_replaced_forward_of_a_block_is_restored():
    """Other tools (accelerate's device placement) replace the ``forward`` of a module."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    block = lm.anatomy.blocks[0]
    theirs = functools.partial(type(block).forward, block)
    block.forward = theirs
    with starting_at(lm.anatomy.blocks, 1, torch.zeros(1, 1, 32), False):
        assert block.forward is not theirs
    assert vars(block)["forward"] is theirs


def test_gradients_reach_the_given_state():
    """The value optimization needs gradients through the upper blocks; compare with a finite difference in float64."""
    lm = LanguageModel(tiny_model("gpt2").double(), tiny_tokenizer())  # llama's norm is always computed in float32
    hidden = block_inputs(lm)[2].requires_grad_()
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(state):
        with starting_at(lm.anatomy.blocks, 2, state, lm.blocks_give_tuples):
            return lm.run(IDS, MASK).logits[0, -1, 3]

    score(hidden).backward()
    with torch.no_grad():
        slope = (score(hidden + 1e-5 * direction) - score(hidden - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((hidden.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9)


# logits_only_at


@torch.no_grad()
def test_logits_only_at_gives_the_full_models_logits_there(lm):
    full = lm.run(IDS, MASK).logits
    widths = []
    handle = lm.anatomy.head.register_forward_hook(lambda m, a, out: widths.append(tuple(out.shape[:-1])))
    with logits_only_at(lm.anatomy.head, ROWS, COLUMNS):
        got = lm.run(IDS, MASK).logits
    handle.remove()
    torch.testing.assert_close(got[0], full[ROWS, COLUMNS], rtol=1e-5, atol=1e-6)
    assert widths == [(1, len(ROWS))]  # the full tensor was never allocated


@torch.no_grad()
def test_soft_caps_after_the_head_still_apply():
    """Gemma 2 caps its logits to (-30, 30), which selecting from the head's output would miss."""
    lm = LanguageModel(tiny_model("gemma2", final_logit_softcapping=0.5), tiny_tokenizer())
    with logits_only_at(lm.anatomy.head, ROWS, COLUMNS):
        logits = lm.run(IDS, MASK).logits
    assert logits.abs().max() <= 0.5
    torch.testing.assert_close(logits[0], lm.run(IDS, MASK).logits[ROWS, COLUMNS], rtol=1e-5, atol=1e-6)


# adding


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 3])
def test_adding_equals_a_hand_made_hook(lm, position):
    shift = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    block, clean = lm.anatomy.blocks[1], traces(lm.model)

    def by_hand(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        pulse = torch.zeros_like(hidden)
        for row in range(2):
            pulse[row, position] = shift[row]
        return (hidden + pulse, *output[1:]) if isinstance(output, tuple) else hidden + pulse

    handle = block.register_forward_hook(by_hand)
    expected = lm.run(IDS, MASK).logits
    handle.remove()
    with adding(block, (torch.tensor([0, 1]), torch.tensor([position, position])), shift, 2):
        got = lm.run(IDS, MASK).logits
    assert torch.equal(got, expected)
    assert not torch.allclose(got, lm.run(IDS, MASK).logits, atol=1e-2)
    assert traces(lm.model) == clean


@torch.no_grad()
def test_adding_does_not_write_into_the_modules_own_tensor():
    given = torch.zeros(1, 2, 3)
    module = nn.Identity()
    with adding(module, (torch.tensor([0]), torch.tensor([1])), torch.ones(1, 3), 1):
        out = module(given)
    assert out.tolist() == [[[0, 0, 0], [1, 1, 1]]]
    assert not given.any()


# reading


@torch.no_grad()
def test_reading_records_inputs_and_outputs(lm):
    """Compare with the hidden states of plain hooks, and the edited map's output with its computation by hand."""
    states = block_inputs(lm)
    clean = traces(lm.model)
    mlp = lm.anatomy.edit_module(2)
    wanted = {
        "in": (lm.anatomy.blocks[2], "input"),
        "out": (lm.anatomy.blocks[2], "output"),
        "key": (mlp, "input"),
        "value": (mlp, "output"),
    }
    with reading(wanted) as seen:
        logits = lm.run(IDS, MASK).logits
    assert torch.equal(seen["in"], states[2])
    assert torch.equal(seen["out"], states[3])
    weight = mlp.weight.T if lm.anatomy.transposed(2) else mlp.weight
    bias = 0 if mlp.bias is None else mlp.bias
    # OPT's MLP sees [rows * tokens, features] in some versions of transformers.
    torch.testing.assert_close(seen["value"], seen["key"] @ weight.T + bias, rtol=1e-4, atol=1e-5)
    assert logits.shape[:2] == IDS.shape  # without a stop the pass runs to its end
    assert traces(lm.model) == clean


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input", "output"])
def test_reading_stops_at_once(lm, kind):
    """No block above the named one runs; if its input is recorded, the block itself does not run either."""
    ran, clean = [], traces(lm.model)
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.anatomy.blocks)]
    handles.append(lm.anatomy.head.register_forward_hook(lambda *_: ran.append("head")))
    after = []
    wanted = {0: (lm.anatomy.blocks[0], "output"), "stop": (lm.anatomy.blocks[1], kind)}
    with reading(wanted, stop="stop") as seen:
        lm.run(IDS, MASK)
        after.append("never")
    for handle in handles:
        handle.remove()
    assert ran == ([0, 1] if kind == "output" else [0])
    assert not after
    assert set(seen) == {0, "stop"}
    assert traces(lm.model) == clean


def test_reading_does_not_catch_other_exceptions():
    module = nn.Identity()
    with pytest.raises(KeyError), reading({"a": (module, "input")}, stop="a"):
        raise KeyError
    assert not module._forward_pre_hooks


def test_reading_keeps_the_last_of_several_passes():
    module = nn.Identity()
    with reading({"a": (module, "output")}) as seen:
        module(torch.zeros(1))
        module(torch.ones(1))
    assert seen["a"].tolist() == [1]


def test_hidden_of_and_replace_hidden_take_both_kinds_of_output():
    a, b, rest = torch.zeros(1), torch.ones(1), object()
    assert hidden_of(a) is a
    assert hidden_of((a, rest)) is a
    assert replace_hidden(a, b) is b
    assert replace_hidden((a, rest), b) == (b, rest)


class _Named(nn.Module):
    """A model whose forward calls the KV cache by one of its two names."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name == "cache":
            self.forward = lambda input_ids, cache=None, use_cache=None: {"cache": cache}  # type: ignore[method-assign]
        else:
            self.forward = lambda input_ids, past_key_values=None, use_cache=None: past_key_values  # type: ignore


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_has_for_it(name):
    model, cache = _Named(name), object()
    assert with_cache(model, cache) == {name: cache, "use_cache": True}
    model(input_ids=IDS, **with_cache(model, cache))  # it takes the argument


def test_a_cache_is_read_from_an_output_by_either_name():
    old = transformers.modeling_outputs.ModelOutput({"past_key_values": (1, 2)})
    assert cache_in(old) == (1, 2)
    new = transformers.modeling_outputs.ModelOutput({"cache": (3, 4)})
    assert cache_in(new) == (3, 4)
