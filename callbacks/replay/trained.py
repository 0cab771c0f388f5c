"""What memory replay can do with a method that trains: earlier facts join the facts that a batch trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from callbacks.replay.buffer import Memory, ReplayBuffer
from editlab.data.fact import Fact
from editlab.solver.base import EditMethod


class Settings(Protocol):
    """The settings of MemoryReplay that may need keys, values or the metric of the closed form."""

    buffer: ReplayBuffer
    consolidates: bool
    weight: float
    repair: float
    refresh: str
    cache_keys: bool


def require_for_training(method: EditMethod, replay: Settings) -> None:
    """Make sure that the settings of MemoryReplay need no keys and values if the method has none.

    Raises:
        UserError: A setting needs keys, values or the metric of the closed form; or the method changes no weights.
    """
    method.require_changed_weights("MemoryReplay", "it replays edits of weights")
    buffer = replay.buffer
    where, memories = "MemoryReplay", "a memory of a method that trains has neither key nor value"
    by_drift = buffer.eviction == "least_important" and buffer.sampling != "loss"
    checks = (
        (replay.consolidates, "memory consolidated", "past keys are part of the metric of the closed form"),
        (replay.cache_keys, "cache_keys", memories),
        (replay.refresh == "values", "refresh values", memories),
        (buffer.sampling == "priority", "sampling priority", memories),
        (by_drift, "eviction least_important without sampling loss", memories),
        (replay.repair != 1, f"repair {replay.repair:g}", "only a residual can be removed in part"),
        (math.isinf(replay.weight), "weight .inf", "a training has no equalities"),
    )
    for wanted, setting, why in checks:
        if wanted:
            method.require_closed_form(f"{where}.{setting}", why)


def add_facts(buffer: ReplayBuffer, facts: Sequence[Fact], step: int) -> None:
    """Add facts that a batch has trained to a buffer, without keys and values."""
    for fact in facts:
        buffer.add(Memory(fact, torch.zeros(0), torch.zeros(0), torch.zeros(0), step))
