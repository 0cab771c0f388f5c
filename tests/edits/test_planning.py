"""The sets of layers, and a search over forecasts that are given: no model."""

import pytest
import torch

from editlab.edits.forecast import Candidate, Forecast
from editlab.edits.planning import MOST_FORECASTS, WEIGHTS, Search, layer_sets
from editlab.errors import UserError
from tests.edits.made_up_laws import laws


def test_sets_of_layers():
    assert layer_sets(range(12), [6], True) == [(2, 3, 4, 5, 6), (4, 5, 6), (6,)]
    assert layer_sets(range(12), [3, 6], True) == [(2, 3, 4, 5, 6), (4, 5, 6), (3, 6), (6,)]
    assert layer_sets(range(12), [1], True) == [(0, 1), (1,)]
    assert layer_sets([0, 2, 4], [4], True) == [(0, 2, 4), (4,)]  # blocks without the edited map are left out
    assert layer_sets(range(12), [6], False) == [(6,)]


def test_a_layer_that_does_not_exist():
    with pytest.raises(UserError, match="names 12, and the layers that can be edited are 0 to 11"):
        layer_sets(range(12), [6, 12], True)


class Sample:
    """Forecasts by a formula: harm 10 / lambda, twice that without memory, and a bit for each layer."""

    def __init__(self):
        self.asked = []

    def forecast(self, candidate, batch_size):
        self.asked.append(candidate)
        harm = (10 if candidate.memory else 20) * (1 + len(candidate.layers) / 10) / candidate.weight
        held = 1 - candidate.weight / 20000 - abs(candidate.context_weight - 0.1)
        crosstalk = 0.01 * len(candidate.layers)
        return [Forecast(candidate, 10, batch_size, torch.tensor([held]).double(), torch.tensor([crosstalk]).double(),
                         0.0, harm, (harm,))]  # fmt: skip


def search(limit):
    sample = Sample()
    return Search(sample, laws(), 2, limit), sample


def test_the_strongest_within_the_limit():
    # Harm 12 / lambda with memory and two layers: .04 at 300, .012 at 1000; of one layer 11 / lambda, less crosstalk.
    found, sample = search(0.02)
    assert found.choose([(1, 2), (2,)]).candidate == Candidate((2,), 1000.0, 0.1, True)
    assert len(sample.asked) == len(set(sample.asked)) <= MOST_FORECASTS


def test_the_least_harm_where_none_is_within():
    found, _ = search(1e-6)
    assert found.choose([(1, 2), (2,)]).candidate == Candidate((2,), WEIGHTS[-1], found.best.candidate.context_weight,
                                                               True)  # fmt: skip


def test_differences_under_a_point_do_not_count():
    # Without a limit 100 is held to .995 and 300 to .985: accuracy .877 and .876, so that the harm decides.
    found, sample = search(1e9)
    assert found.choose([(1, 2), (2,)]).candidate == Candidate((2,), 300.0, 0.1, True)
    assert Candidate((2,), WEIGHTS[0], 0.1, True) in sample.asked
