"""Functions that say which run a cell of a grid is read from, named in a grid's ``cells``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One combination of a grid's axes."""

    axes: Mapping[str, Any]
    """axis -> its value in this cell"""
    run: Mapping[str, Any]
    """axis -> the value of the run that the cell is read from"""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """further columns of the cell's rows"""
    possible: bool = True
    """whether it can be run; otherwise tables list it as not run"""


def own_run(axes: Mapping[str, Any], edits: int | None) -> Cell:
    """Each cell has a run of its own."""
    return Cell(axes, axes)


def shared_without_replay(axes: Mapping[str, Any], edits: int | None) -> Cell:
    """Cells of a ``batch_size`` and a ``replay_rate`` in which nothing is ever replayed share the run of rate 0.

    A replayed fraction is rounded to whole facts of a batch, as ``MemoryReplay`` does, and one batch of all facts has
    none before it. Batches that are larger than all facts cannot be run.
    """
    size, rate = axes["batch_size"], axes["replay_rate"]
    total = math.inf if edits is None else edits
    replayed = math.floor(rate * size + 0.5) if size < total else 0
    run = axes if replayed else {**axes, "replay_rate": 0.0}
    return Cell(axes, run, {"replayed_a_batch": replayed}, possible=size <= total)


CELLS: dict[str, Callable[[Mapping[str, Any], int | None], Cell]] = {
    "own_run": own_run,
    "shared_without_replay": shared_without_replay,
}
"""name -> function of a cell's axes and the number of edits"""
