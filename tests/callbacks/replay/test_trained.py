"""Replay with methods that train: what it refuses, and a memory without key and value."""

import math
from types import SimpleNamespace

import pytest

from callbacks.replay.buffer import ReplayBuffer
from callbacks.replay.trained import add_facts, require_for_training
from editlab.errors import UserError
from editlab.training.methods import FineTune
from tests.facts import FACTS

FINE = {"consolidates": False, "weight": 1.0, "repair": 1.0, "refresh": "none", "cache_keys": False}


def replay(policies, **changes):
    """Settings of MemoryReplay."""
    return SimpleNamespace(buffer=ReplayBuffer(4, **policies), **{**FINE, **changes})


@pytest.mark.parametrize(
    ("changes", "policies", "message"),
    [
        ({"consolidates": True}, {}, "memory consolidated cannot be used with the method FineTune, because past keys"),
        (
            {"cache_keys": True},
            {},
            "cache_keys cannot be used with the method FineTune, because a memory",
        ),
        ({"refresh": "values"}, {}, "refresh values"),
        ({"repair": 0.5}, {}, "repair 0.5"),
        ({"weight": math.inf}, {}, r"weight \.inf"),
        ({}, {"sampling": "priority"}, "sampling priority"),
        ({}, {"eviction": "least_important"}, "eviction least_important without sampling loss"),
    ],
)
def test_errors_of_settings_that_need_keys_or_values(changes, policies, message):
    with pytest.raises(UserError, match=f"MemoryReplay.{message}"):
        require_for_training(FineTune(), replay(policies, **changes))


@pytest.mark.parametrize("policies", [{}, {"sampling": "loss", "eviction": "least_important"}, {"eviction": "lru"}])
def test_other_policies_are_allowed(policies):
    require_for_training(FineTune(), replay(policies))


def test_a_memory_of_a_fact_alone_is_saved_and_sampled():
    buffer, other = ReplayBuffer(4), ReplayBuffer(4)
    add_facts(buffer, FACTS[:3], 0)
    assert buffer.size == 0  # bytes of tensors
    other.load_state_dict(buffer.state_dict())
    assert [memory.fact for memory in other.sample(3)] == FACTS[:3]
