"""An outcome's factor is the lowest that any callback asks for."""

import pytest
import torch

from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.values.spread import Targets
from tests.facts import FACTS


def plan_of(step, values):
    facts = FACTS[: len(values)]
    return EditPlan(step, facts, Targets(facts, {1: values}))


def test_the_lowest_factor_counts_whatever_the_order():
    for factors in ((0.5, 0.8), (0.8, 0.5)):
        outcome = EditOutcome(plan_of(0, torch.zeros(1, 2)), {}, {})
        for factor in factors:
            outcome.scale(factor, f"by {factor}")
        assert outcome.factor == 0.5
        assert outcome.kept
        assert len(outcome.reasons) == 2
        outcome.roll_back("harm")
        assert not outcome.kept
    with pytest.raises(ValueError, match="between 0 and 1"):
        outcome.scale(1.5, "more")


def test_facts_may_be_dropped_from_a_batch():
    plan = plan_of(3, torch.arange(6.0).view(3, 2))
    outcome = EditOutcome(plan, {1: torch.ones(2, 2)}, {"layer_1/gram_condition": 1.0})
    outcome.drop({1}, "no gain")
    assert (outcome.factors, outcome.factor, outcome.kept) == ([1.0, 0.0, 1.0], 1.0, True)
    outcome.scale(0.5, "harm")
    outcome.remove_dropped()
    assert outcome.plan.facts == [FACTS[0], FACTS[2]]
    assert outcome.plan.targets.first.tolist() == [[0, 1], [4, 5]]
    assert (outcome.plan.step, outcome.updates, outcome.diagnostics) == (3, {}, {})
    assert outcome.factors == [0.5, 0.0, 0.5]  # of the whole batch, still
    with pytest.raises(ValueError, match="the batch has 3 facts"):
        outcome.drop({3}, "none such")


def test_a_batch_without_any_fact_is_rolled_back():
    outcome = EditOutcome(plan_of(0, torch.zeros(2, 2)), {}, {})
    outcome.drop({0}, "no gain")
    outcome.drop({1}, "harm")
    assert not outcome.kept
    assert outcome.factors == [0.0, 0.0]


def test_additions_gather():
    plan = plan_of(0, torch.zeros(1, 2))
    plan.add([Addition(FACTS[1], torch.zeros(2))])
    plan.add([Addition(FACTS[2], torch.zeros(2), 3.0)])
    assert [a.weight for a in plan.additions] == [1.0, 3.0]
