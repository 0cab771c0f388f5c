"""Removal of one run's edits among others in the same weight, against sums of the updates that should be left."""

from __future__ import annotations

import gc
from itertools import permutations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editlab import edit_model
from editlab.edits import standing
from editlab.edits.edited_layer import EditedLayer
from tests.test_api import PLAIN, SMALL
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(params=["linear", "conv1d", "bfloat16"])
def module(request):
    torch.manual_seed(0)
    made = Conv1D(3, 5) if request.param == "conv1d" else nn.Linear(5, 3)
    with torch.no_grad():
        made.weight.normal_()
        made.weight[0, 0] = -0.0  # a sum with 0.0 would change its sign
    return made.bfloat16() if request.param == "bfloat16" else made


def edit(module, seed):
    """A finished run with one update."""
    layer = EditedLayer(module, isinstance(module, Conv1D))
    layer.add(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)))
    standing.record([layer])
    return layer


def bits(tensor):
    return tensor.detach().clone().contiguous().view(torch.uint8)


def with_updates(original, layers):
    """The weight after the updates of some runs, each rounded to the weight's type."""
    weight = original
    for layer, update in layers:
        weight = (weight + (update.T if layer.transposed else update)).to(weight.dtype)
    return weight


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_each_removal_leaves_exactly_the_edits_of_the_others(module, order):
    original = module.weight.detach().clone()
    layers = [edit(module, seed) for seed in range(3)]
    updates = [layer.total.clone() for layer in layers]
    left = [0, 1, 2]
    for gone in order:
        standing.remove([layers[gone]])
        left.remove(gone)
        expected = with_updates(original, [(layers[i], updates[i]) for i in left])
        assert torch.equal(bits(module.weight), bits(expected))
        standing.remove([layers[gone]])  # a second time changes nothing
        assert torch.equal(bits(module.weight), bits(expected))
    assert torch.equal(bits(module.weight), bits(original))


@pytest.mark.parametrize("when", ["between", "after"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_changes_by_anyone_else_stay(order, when):
    """Such as training between two calls: all is right up to rounding."""
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    original, change = module.weight.detach().clone(), torch.randn(3, 5)
    layers = [edit(module, 0)]
    for moment in ("between", "after"):
        if moment == when:
            with torch.no_grad():
                module.weight += change
        if moment == "between":
            layers.append(edit(module, 1))
    other = layers[order[1]].total.clone()
    standing.remove([layers[order[0]]])
    torch.testing.assert_close(module.weight.detach(), original + change + other, rtol=1e-5, atol=1e-6)
    standing.remove([layers[order[1]]])
    torch.testing.assert_close(module.weight.detach(), original + change, rtol=1e-5, atol=1e-6)


def test_an_edit_whose_result_is_gone_is_part_of_the_weights():
    module = nn.Linear(5, 3)
    first, second = edit(module, 0), edit(module, 1)
    after_first = second.original.clone()
    del first
    gc.collect()
    standing.remove([second])
    assert torch.equal(module.weight, after_first)


def test_a_weight_that_is_not_a_number_comes_back():
    module = nn.Linear(5, 3)
    original = module.weight.detach().clone()
    layer = EditedLayer(module, False)
    layer.add(torch.full((3, 5), torch.nan))
    standing.record([layer])
    standing.remove([layer])
    assert torch.equal(module.weight, original)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_results_of_two_calls_are_reverted_in_any_order(order):
    """The second call edits one of the first one's layers, and one of its own."""
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    results = [
        edit_model(model, tiny_tokenizer(), [fact], **{**SMALL, "layers": layers})[1]
        for fact, layers in zip(PLAIN, ([1, 2], [2]), strict=True)
    ]
    kept = {n: layer.total.clone() for n, layer in results[order[1]].editor.layers_by_number.items()}
    results[order[0]].revert()
    for number in (1, 2):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        expected = before[name] + kept[number] if number in kept else before[name]
        assert torch.equal(dict(model.named_parameters())[name], expected)
    results[order[1]].revert()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
