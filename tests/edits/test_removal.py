"""Single facts out of edited weights: against the closed form written out with inverses, and the layers' outputs."""

import functools

import pytest
import torch

from editlab.edits.edited_layer import EditedLayer, unedited
from editlab.edits.removal import RemovalSettings, take_out
from editlab.errors import UserError
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.solver.preservation import Preservation
from tests.facts import FACTS, capital
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = (1, 2)


@functools.cache
def lm():
    return LanguageModel(tiny_model("llama").double(), tiny_tokenizer())


def c0(layer):
    keys = torch.randn(48, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    return keys @ keys.T / 200 + torch.eye(48, dtype=torch.float64)


METRICS = {layer: Preservation.from_moments(c0(layer), ridge=1e-300) for layer in LAYERS}


@pytest.fixture
def layers():
    """Two layers with sums of updates, as if many facts had been edited; the original weights come back at the end."""
    generator = torch.Generator().manual_seed(7)
    found = {layer: EditedLayer.of(lm(), layer) for layer in LAYERS}
    for layer in found.values():
        layer.add(0.1 * torch.randn(layer.total.shape, generator=generator))
    yield found
    for layer in found.values():
        layer.restore(torch.zeros_like(layer.total))


def keys_of(facts, layer):
    found = read_keys(lm(), facts, layer, Site(layer, False, lm().anatomy.edit_module(layer)), [""], "bare")
    return found.keys, found.context_keys, found.current


def distinct(keys):
    """The columns that no earlier column equals."""
    new = [i for i in range(keys.shape[1]) if all((keys[:, i] - keys[:, j]).norm() > 1e-4 for j in range(i))]
    return keys[:, new]


@pytest.mark.parametrize("context", [0.0, 0.5])
def test_one_layer_is_the_closed_form_written_out(layers, context):
    facts, held = FACTS[:2], FACTS[2:5]
    layer, total = layers[2], layers[2].total.double().clone()
    own, own_context, _ = keys_of(facts, 2)
    # The tokens before the subject are the same in both prompts, and one constraint stands for equal keys.
    keys = distinct(torch.cat([own, own_context], 1))
    others, context_keys, _ = keys_of(held, 2)
    updates = take_out(lm(), {2: layer}, facts, held, METRICS, RemovalSettings(3.0, context))
    inverse = torch.linalg.inv(c0(2) + 3 * others @ others.T + context * context_keys @ context_keys.T)
    expected = -total @ keys @ torch.linalg.inv(keys.T @ inverse @ keys) @ keys.T @ inverse
    torch.testing.assert_close(updates[2].double(), expected, rtol=1e-5, atol=1e-7)  # sums are float32


def test_every_layer_outputs_what_the_original_layer_outputs(layers):
    take_out(lm(), layers, FACTS[:2], FACTS[2:5], METRICS, RemovalSettings())
    for number, layer in layers.items():
        keys, _, now = keys_of(FACTS[:2], number)
        torch.testing.assert_close(now, layer.original.double() @ keys, rtol=1e-6, atol=1e-6)  # llama has no bias
        context = keys_of(FACTS[:2], number)[1]
        assert (layer.total.double() @ context).norm() < 1e-4 * layer.total.norm() * context.norm()
        assert (layer.total.double() @ keys_of(FACTS[2:3], number)[0]).norm() > 0.01  # others are not taken out


def test_a_fact_that_was_edited_alone_leaves_nothing(layers):
    # The sum is the update of one fact at one layer, in the same metric: its removal is the update backwards.
    for number in LAYERS:
        layers[number].restore(torch.zeros_like(layers[number].total))
    layer = layers[2]
    key, _, _ = keys_of(FACTS[:1], 2)
    direction = METRICS[2].inverse_times(key)
    layer.add((torch.ones(32, 1, dtype=torch.float64) @ direction.T / float(key.T @ direction)).float())
    assert layer.total.norm() > 0.1
    take_out(lm(), {2: layer}, FACTS[:1], [], METRICS, RemovalSettings())
    assert layer.total.norm() < 1e-5


def test_a_larger_weight_holds_the_others_better(layers):
    moved = []
    for hold in (1e-6, 1.0, 1e4):
        sums = {number: layer.total.clone() for number, layer in layers.items()}
        before = keys_of(FACTS[2:5], 2)[2]
        take_out(lm(), layers, FACTS[:1], FACTS[2:5], METRICS, RemovalSettings(hold))
        moved.append(float((keys_of(FACTS[2:5], 2)[2] - before).norm()))
        for number, layer in layers.items():
            layer.restore(sums[number])
    assert moved[0] > moved[1] > moved[2]


def test_a_held_fact_with_the_same_key_is_named(layers):
    sums = {number: layer.total.clone() for number, layer in layers.items()}
    twin = capital("France", "Paris", "Oslo")  # another prompt that agrees with the first up to the subject
    twin = type(twin)("France", "The capital of {} will be", "Oslo", "Paris")
    with pytest.raises(UserError, match=r"France\|The capital of \{\} is cannot be taken out alone.*name both"):
        take_out(lm(), layers, FACTS[:1], [FACTS[2], twin], METRICS, RemovalSettings())
    assert all(torch.equal(sums[number], layer.total) for number, layer in layers.items())


def test_nothing_to_take_out_is_an_error(layers):
    with pytest.raises(ValueError, match="no fact"):
        take_out(lm(), layers, [], FACTS[:1], METRICS, RemovalSettings())
    with unedited(layers.values()):
        assert torch.equal(layers[1].weight, layers[1].original)
