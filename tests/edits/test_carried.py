"""What is carried into the next solve, by hand: after post-steps, a scaling, a rollback, a scaling with a memory."""

import pytest
import torch

from editlab.edits.carried import Carried
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.values.spread import Targets
from tests.facts import FACTS


def outcome(factor, updates, cut):
    """A solved batch: layer -> a number, of which its update, or what was cut off from it, is a matrix."""
    made = EditOutcome(EditPlan(0, FACTS[:2], Targets(FACTS[:2], {1: torch.zeros(2, 3)})))
    made.updates = {layer: torch.full((1, 2), number) for layer, number in updates.items()}
    made.cut = {layer: torch.full((1, 2), number) for layer, number in cut.items()}
    made.scale(factor, "so says the test")
    return made


def parts(carried):
    return {layer: part.flatten().tolist() for layer, part in carried.parts.items()}


@pytest.mark.parametrize(
    ("factor", "cut", "before", "expected"),
    [
        (1.0, {}, {}, {}),
        (1.0, {}, {1: 3.0}, {}),  # the solve made up for it
        (1.0, {1: 8.0}, {1: 3.0}, {1: 8.0}),
        (0.25, {1: 8.0}, {1: 4.0}, {1: 5.0}),  # 8 / 4 of this batch, 3/4 of 4 that it did not make up for
        (0.25, {}, {1: 4.0}, {1: 3.0}),
        (0.25, {1: 8.0}, {}, {1: 2.0}),
        (0.0, {1: 8.0}, {1: 4.0}, {1: 4.0}),  # rolled back: as if there had been no batch
    ],
)
def test_what_a_batch_leaves(factor, cut, before, expected):
    carried = Carried()
    carried.load_state_dict({layer: torch.full((1, 2), number) for layer, number in before.items()})
    carried.settle(outcome(factor, {1: 16.0}, cut))
    assert parts(carried) == {layer: [number] * 2 for layer, number in expected.items()}


def test_a_memory_has_the_rest_of_a_scaled_batch_completed():
    carried = Carried()
    carried.load_state_dict({1: torch.ones(1, 2)})
    scaled = outcome(0.25, {1: 16.0, 2: 4.0}, {1: 8.0})
    carried.settle(scaled)
    carried.complete(scaled)
    assert parts(carried) == {1: [20.0, 20.0], 2: [3.0, 3.0]}  # 3/4 of 16 and 8; 3/4 of 4
    again = Carried()
    again.load_state_dict(carried.state_dict())
    assert parts(again) == parts(carried)


def test_a_batch_that_is_solved_again_has_cut_off_nothing_yet():
    made = outcome(1.0, {1: 16.0}, {1: 8.0})
    made.drop([0], "no gain")
    made.remove_dropped()
    assert made.cut == {}
