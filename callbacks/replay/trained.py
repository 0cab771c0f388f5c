"""What memory replay can do with a method that trains: earlier facts join the facts that a batch trains on."""

from __future__ import annotations

import math

import torch

from callbacks.replay.buffer import Memory, ReplayBuffer
from editlab.data.fact import Fact
from editlab.solver.base import EditMethod


def require_for_training(
    method: EditMethod,
    buffer: ReplayBuffer,
    consolidates: bool,
    weight: float,
    repair: float,
    refresh: str,
    cached: bool,
) -> None:
    """Make sure that a method without keys and values needs none for the settings of MemoryReplay.

    Args:
        method: the editing method.
        buffer: the buffer with its policies.
        consolidates: whether past keys enter the metric.
        weight: weight of a replayed fact.
        repair: fraction of a replayed fact's residual to remove.
        refresh: which part of a memory is recomputed.
        cached: whether keys are cached.

    Raises:
        UserError: A setting needs keys, values or the metric of the closed form.
    """
    where, memories = "MemoryReplay", "a memory of a method that trains has neither key nor value"
    by_drift = buffer.eviction == "least_important" and buffer.sampling != "loss"
    checks = (
        (consolidates, "memory consolidated", "past keys are part of the metric of the closed form"),
        (cached, "cache_keys", memories),
        (refresh == "values", "refresh values", memories),
        (buffer.sampling == "priority", "sampling priority", memories),
        (by_drift, "eviction least_important without sampling loss", memories),
        (repair != 1, f"repair {repair:g}", "only a residual can be removed in part"),
        (math.isinf(weight), "weight .inf", "a training has no equalities"),
    )
    for wanted, setting, why in checks:
        if wanted:
            method.require_closed_form(f"{where}.{setting}", why)


def fact_alone(fact: Fact, step: int) -> Memory:
    """A memory of a fact that has neither key nor value."""
    return Memory(fact, torch.zeros(0), torch.zeros(0), torch.zeros(0), step)
