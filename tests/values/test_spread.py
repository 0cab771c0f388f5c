"""Targets for several layers: hooks on the plain model, a linear model by hand, layer after layer (BLUE)."""

import math
from functools import partial

import pytest
import torch

from editlab.data.fact import Fact
from editlab.edits.batch import BatchSolver
from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.keys.subject_keys import Site, locate, read_keys, read_outputs
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET, MEMIT
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings
from editlab.values.spread import EACH, FORWARD, RESIDUAL, Targets, carry_forward, distinct, find_targets, sites_of
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("France", "The capital of {} lies in", "Peru"),  # the same tokens up to the subject's last, another value
    Fact("Oslo", "{} lies in", "Peru"),  # at the start
    Fact("Danielle Darrieux", "Mother tongue of Danielle Darrieux: {} speaks", "Swedish"),
]


def make(family="llama", **changes):
    return LanguageModel(tiny_model(family, **changes), tiny_tokenizer())


def search(lm, facts, site):
    return optimize_values(lm, facts, site, [""], ValueSettings(steps=4, lr=0.3, clamp=2.0, matmul="float32")).target


def by_hooks(lm, fact, first, value, site):
    """The site's output in a whole pass of the plain model whose first site gives the value at the subject's token."""
    encoding, last = locate(lm, fact)
    seen = []

    def put(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden.view(len(encoding.ids), -1)[last] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def note(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.view(len(encoding.ids), -1)[last])

    handles = [first.module.register_forward_hook(put), site.module.register_forward_hook(note)]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([encoding.ids]))
    for handle in handles:
        handle.remove()
    return seen[0]


# gptj's blocks return tuples, gemma2 has its site in the MLP and pads its rows, opt and gpt2 add positions.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "opt"])
def test_carried_forward_as_by_hooks_on_the_plain_model(family):
    lm = make(family)
    first, *higher = (Site.of(lm, layer) for layer in (0, 2, 3))
    values = 3 * torch.randn(len(FACTS), 32, generator=torch.Generator().manual_seed(1))
    found = carry_forward(lm, FACTS, first, values, higher)
    for site in higher:
        expected = torch.stack([by_hooks(lm, f, first, v, site) for f, v in zip(FACTS, values, strict=True)])
        assert torch.allclose(found[site.layer], expected, rtol=1e-4, atol=1e-5)
        assert (found[site.layer][0] - found[site.layer][1]).norm() > 0.1  # no common beginning was shared
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_outputs_are_those_that_keys_are_read_with():
    lm = make()
    sites = [Site.of(lm, 1), Site.of(lm, 3)]
    outputs = read_outputs(lm, FACTS, sites)
    for index, site in enumerate(sites):
        assert torch.equal(outputs[:, index].T, read_keys(lm, FACTS, site.layer, site, [""], "bare").current)


# ---- a model that is linear by construction


LAMBDA, ONES = 3.0, {1: 1, 2: 6}
ALPHA = {layer: ones / (ones + LAMBDA) for layer, ones in ONES.items()}
"""The fraction of its residual that one soft edit removes: k^T C^-1 k / (k^T C^-1 k + 1) with C = lambda I."""


def linear(spread, method=None, passes=1):
    """A GPT-2 without attention whose keys are constants of 1 and 6 ones, so that a block adds W k to the stream."""
    model = tiny_model("gpt2", activation_function="relu").double()
    with torch.no_grad():
        for number, block in enumerate(model.transformer.h):
            block.attn.c_proj.weight.zero_(), block.attn.c_proj.bias.zero_(), block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.bias.copy_((torch.arange(48) < ONES.get(number, 2)).double())
    lm = LanguageModel(model, tiny_tokenizer())
    settings = SolveSettings(method or MEMIT(covariance_weight=LAMBDA, ridge=1e-12), passes=passes)
    solver = BatchSolver.at(lm, [1, 2], [""], settings, spread)
    solver.set_moments({layer: torch.eye(48, dtype=torch.float64) for layer in (1, 2)})
    return lm, solver


def moved(lm, solver, targets):
    """By how much a solve moves the sites of layers 1 and 2, [2, d_v]."""
    before = read_outputs(lm, FACTS[:1], [Site.of(lm, layer) for layer in (1, 2)])
    outcome = EditOutcome(EditPlan(0, FACTS[:1], targets))
    solver.solve(outcome)
    now = read_outputs(lm, FACTS[:1], [Site.of(lm, layer) for layer in (1, 2)])
    assert len(outcome.residual_norm) == 1
    return (now - before)[0]


ASKED = {1: torch.linspace(-1, 1, 32), 2: torch.linspace(2, 0, 32)}
"""What the searches ask for, as a move of each site."""


def ask(lm, facts, site):
    """A search that finds the site's output now, moved as above."""
    return (read_outputs(lm, facts, [site])[:, 0] + ASKED[site.layer]).float()


def test_residual_on_paper():
    # Of r at the top, layer 1 takes a1 r / 2, and layer 2 removes a2 of what is left, (1 - a1 / 2) r.
    lm, solver = linear(RESIDUAL)
    (site,) = distinct(solver.sites)
    targets = find_targets(lm, RESIDUAL, [site], FACTS[:1], partial(ask, lm))
    low, high = moved(lm, solver, targets)
    r, (a1, a2) = ASKED[2].double(), ALPHA.values()
    torch.testing.assert_close(low, a1 / 2 * r, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(high, (a1 / 2 + a2 * (1 - a1 / 2)) * r, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_forward_on_paper(passes):
    # A move of the stream at layer 1 arrives unchanged at layer 2, so both ask for r. Layer 1 removes a1 of its
    # residual, and layer 2 a2 of what is then left; a second pass the same fractions of what the first has left.
    lm, solver = linear(FORWARD, passes=passes)
    targets = find_targets(lm, FORWARD, distinct(solver.sites), FACTS[:1], partial(ask, lm))
    r, (a1, a2) = ASKED[1].double(), ALPHA.values()
    before = read_outputs(lm, FACTS[:1], distinct(solver.sites))[0]
    torch.testing.assert_close(targets.stacked()[0].double() - before, torch.stack([r, r]), rtol=1e-5, atol=1e-5)
    low = high = 0.0
    for _ in range(passes):
        low += a1 * (1 - low)
        high += a2 * (1 - low - high)
    found = moved(lm, solver, targets)
    torch.testing.assert_close(found, torch.stack([low * r, (low + high) * r]), rtol=1e-5, atol=1e-5)


def test_forward_leaves_nothing_to_higher_layers_if_the_first_reaches_its_value():
    lm, solver = linear(FORWARD, EMMET(gram_ridge=0.0))
    moved(lm, solver, find_targets(lm, FORWARD, distinct(solver.sites), FACTS[:1], partial(ask, lm)))
    assert solver.layers[2].total.norm() < 1e-5 * solver.layers[1].total.norm()


@pytest.mark.parametrize("in_turn", [False, True])
def test_each_on_paper(in_turn):
    # Layer 1 moves both sites by a1 p. At once, layer 2 was asked for q above the unedited output, and a1 p of it is
    # there; in turn, it is asked for q above what layer 1 has left.
    lm, solver = linear(EACH)
    find = partial(ask, lm)
    targets = find_targets(lm, EACH, distinct(solver.sites), FACTS[:1], find, find if in_turn else None)
    low, high = moved(lm, solver, targets)
    p, q, (a1, a2) = ASKED[1].double(), ASKED[2].double(), ALPHA.values()
    torch.testing.assert_close(low, a1 * p, rtol=1e-5, atol=1e-5)
    expected = a1 * p + a2 * (q if in_turn else q - a1 * p)
    torch.testing.assert_close(high, expected, rtol=1e-5, atol=1e-5)


# ---- the same on a model with all its blocks


def solver_at(lm, layers, spread=RESIDUAL):
    solver = BatchSolver.at(lm, layers, [""], SolveSettings(MEMIT(covariance_weight=0.1)), spread)
    solver.set_moments({layer: torch.eye(48, dtype=torch.float64) for layer in layers})
    return solver


def test_each_in_turn_is_layer_after_layer():
    """BLUE's code: search, keys, residual and update of the first layer; then all of them for the last layer."""
    lm = make()
    solver = solver_at(lm, [0, 2], EACH)
    find = partial(search, lm)
    outcome = EditOutcome(EditPlan(0, FACTS, find_targets(lm, EACH, distinct(solver.sites), FACTS, find, find)))
    with torch.no_grad():
        solver.solve(outcome)
    plain = make()
    for layer in (0, 2):
        single, site = solver_at(plain, [layer]), Site.of(plain, layer)
        values = search(plain, FACTS, site)
        single.solve(EditOutcome(EditPlan(0, FACTS, Targets(FACTS, {layer: values}))))
        assert torch.equal(single.layers[layer].total, solver.layers[layer].total)
        assert torch.equal(outcome.plan.targets.at(layer), values)


def test_each_at_once_is_found_on_the_weights_as_they_are():
    lm = make()
    sites = distinct(sites_of(lm, [2, 0], EACH))
    targets = find_targets(lm, EACH, sites, FACTS, partial(search, lm))
    assert targets.layers == [0, 2]
    assert all(torch.equal(targets.at(site.layer), search(lm, FACTS, site)) for site in sites)


@pytest.mark.parametrize("spread", [EACH, FORWARD])
def test_one_layer_is_its_own_first_and_last(spread):
    lm = make()
    assert sites_of(lm, [2], spread) == sites_of(lm, [2], RESIDUAL)
    (site,) = sites_of(lm, [2], spread).values()
    targets = find_targets(lm, spread, [site], FACTS, partial(search, lm), partial(search, lm))
    assert targets.layers == [2]
    assert torch.equal(targets.first, search(lm, FACTS, site))


# ---- what is found while a batch is solved


def late():
    """Targets of three facts at layers 1 and 3, of which the latter are found late; and the facts of each search."""
    asked = []

    def find(facts, site):
        asked.append(list(facts))
        assert torch.is_grad_enabled()
        return torch.full((len(facts), 2), float(site.layer))

    site = Site(3, True, torch.nn.Identity())
    return Targets(FACTS[:3], {1: torch.arange(6.0).view(3, 2)}, [site], find), asked


def test_values_are_found_once_and_again_without_dropped_facts():
    targets, asked = late()
    assert asked == []
    with torch.no_grad():
        assert targets.stacked().shape == (3, 2, 2)
    targets.at(3)
    assert asked == [FACTS[:3]]
    fewer = targets.of([0, 2])  # what was found with the update for all three is not right for two
    assert fewer.first.tolist() == [[0, 1], [4, 5]]
    assert fewer.at(3).tolist() == [[3, 3], [3, 3]]
    assert asked[1:] == [[FACTS[0], FACTS[2]]]
    targets.unsolved().at(3)
    assert asked[2:] == [FACTS[:3]]


def test_a_change_is_made_to_values_found_later_too():
    targets, _ = late()
    changed = targets.changed(lambda values: -values)
    assert torch.equal(changed.first, -targets.first)
    assert torch.equal(changed.at(3), -targets.at(3))


# ---- bad input


def test_errors_of_settings():
    with pytest.raises(UserError, match="spread is 'replay': it must be one of residual, each, forward"):
        ValueSettings(spread="replay")


def test_errors_of_additions_with_another_number_of_sites():
    lm = make()
    solver = solver_at(lm, [0, 2], EACH)
    values = {layer: torch.zeros(1, 32) for layer in (0, 2)}
    plan = EditPlan(0, FACTS[:1], Targets(FACTS[:1], values))
    plan.add([Addition(FACTS[2], torch.zeros(32), math.inf)])
    with pytest.raises(ValueError, match="targets for 1 sites: the layers work towards 2"):
        solver.solve(EditOutcome(plan))
