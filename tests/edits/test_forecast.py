"""A forecast against a sequence that a model really went through, and what is measured for it."""

import pytest
import torch

from callbacks.replay.past_keys import PastKeys
from editlab.edits.batch import BatchSolver
from editlab.edits.forecast import Candidate, FactSample
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.keys.subject_keys import Site, read_outputs
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import MEMIT
from editlab.values.spread import Targets
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

EDITS, LAYER, WEIGHT = 8, 2, 0.5


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_model("llama").double(), tiny_tokenizer())


@pytest.fixture
def moments():
    root = torch.randn(48, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T / 200


def sample(lm, moments, facts=FACTS[:EDITS], edits=EDITS, layers=(LAYER,), residuals=None):
    outputs = read_outputs(lm, facts, [Site.of(lm, max(layers))])[:, 0]
    values = outputs + (torch.ones_like(outputs) if residuals is None else residuals)
    return FactSample.of(lm, facts, edits, dict.fromkeys(layers, moments), values, outputs)


@pytest.mark.parametrize("memory", [False, True])
def test_a_forecast_is_what_the_model_does(lm, moments, memory):
    # Residuals are the unit vectors e_1 ... e_8, so that the move at key j is column j of H.
    residuals = torch.eye(EDITS, 32, dtype=torch.float64)
    facts = FACTS[:EDITS]
    solver = BatchSolver.at(lm, [LAYER], [""], SolveSettings(MEMIT(WEIGHT), context_key_weight=0.3))
    solver.set_moments({LAYER: moments.clone()})
    bare, past = solver.preservation[LAYER], PastKeys(1.0)
    site = [Site.of(lm, LAYER)]
    before = read_outputs(lm, facts, site)[:, 0]
    try:
        for start in range(0, EDITS, 4):
            batch = slice(start, start + 4)
            values = {LAYER: (before + residuals)[batch]}
            outcome = EditOutcome(EditPlan(0, facts[batch], Targets(facts[batch], values)))
            solver.solve(outcome)
            if memory:
                keys = outcome.keys[LAYER]
                past.add(LAYER, keys.keys, keys.context_keys, 0.3)
                solver.preservation[LAYER] = bare.plus_moments(past.moments[LAYER])
        moved = (read_outputs(lm, facts, site)[:, 0] - before).T[:EDITS]
    finally:
        solver.layers[LAYER].restore(torch.zeros_like(solver.layers[LAYER].total))
    candidate = Candidate((LAYER,), WEIGHT, 0.3, memory)
    (found,) = sample(lm, moments, residuals=residuals).forecast(candidate, 4)
    assert torch.allclose(found.held, moved.diagonal(), atol=1e-5)  # sums of updates are float32
    others = moved.clone().fill_diagonal_(0).norm(dim=0)
    assert torch.allclose(found.crosstalk, others, atol=1e-5)
    update = solver.layers[LAYER].total.double()
    assert not update.any()  # restored


def test_harm_and_output_errors_by_hand(lm, moments):
    # Residuals of ones: mean square 32, cosine 1, so text pays 32 |1^T A|^2 in the metric of C0.
    one = sample(lm, moments)
    assert (one.square, one.alike) == (pytest.approx(32.0), pytest.approx(1.0))
    candidate = Candidate((LAYER,), WEIGHT, 0.0, True)
    (found,) = one.forecast(candidate, EDITS)
    keys = one.layers[LAYER].keys
    metric = WEIGHT * (moments + 1e-6 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64))
    solved = torch.linalg.inv(metric) @ keys
    together = torch.linalg.inv(keys.T @ solved + torch.eye(EDITS).double()).sum(0) @ solved.T
    spent = 32 * float(together @ moments @ together)
    outputs = read_outputs(lm, FACTS[:EDITS], [Site.of(lm, LAYER)])[:, 0]
    assert found.harm == pytest.approx(spent / float(outputs.square().sum(1).mean()), rel=1e-6)
    weight = lm.anatomy.edit_module(LAYER).weight.detach().double()
    energy = float(torch.trace(weight @ moments @ weight.T))
    assert found.output_errors == pytest.approx(((spent / energy) ** 0.5,), rel=1e-6)


def test_facts_that_are_not_at_hand_are_drawn(lm, moments):
    found = sample(lm, moments, facts=FACTS[:4], edits=9)
    assert (found.read, found.edits) == (4, 9)
    assert found.first(3).read == found.first(3).edits == 3
    forecasts = found.forecast(Candidate((LAYER,), WEIGHT, 0.0, True), 3, at=[3, 6])
    assert [one.edits for one in forecasts] == [3, 6, 9]
    assert forecasts[0].held.mean() > forecasts[-1].held.mean()


def test_a_candidate_in_words():
    assert str(Candidate((2, 3, 4), 1000.0, 0.1, True)) == (
        "layers 2 to 4, lambda 1000, context keys 0.1, consolidated memory"
    )
    assert str(Candidate((2, 6), 300.0, 0.0, False, slack=0.1, mu=3)) == (
        "layers 2, 6, lambda 300, slack 0.1, mu 3, context keys 0, no memory"
    )
