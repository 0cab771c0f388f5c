"""Counts of the operations that a GPU would run, and of the host's waits for them, by line of the caller.

A *launch* is an operation that computes or copies. Most are one kernel; some (sorting, accumulating ``index_put``) are
several. A *wait* is a point where the host cannot continue before the device has finished all launched operations:

- ``read``: a value is read (``item``, ``bool``, ``tolist``);
- ``shape``: the shape of a result depends on values (``nonzero``, ``unique``, a bool mask as an index);
- ``to host``: a copy to the host's memory;
- ``to device``: a copy from the host's pageable memory without ``non_blocking``.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

import editlab
from tests.pretend.tensor import COPIES, INDEXING, Call, PretendTensor

ROOT = Path(editlab.__file__).parents[1]
PACKAGES = tuple(f"{ROOT}/{name}/" for name in ("editlab", "callbacks"))
"""Folders of the code whose operations are counted."""

_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
_NOT_LAUNCHED = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "lift",
    "_local_scalar_dense", "is_same_size", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


@dataclass
class Counts:
    """Launches and waits since the last :meth:`reset`."""

    launches: Counter[str] = field(default_factory=Counter)
    """file:line -> launches"""
    waits: Counter[str] = field(default_factory=Counter)
    """file:line (kind) -> waits"""

    def reset(self) -> None:
        """Set all counts to 0."""
        self.launches.clear()
        self.waits.clear()

    def launch(self, number: int = 1) -> None:
        """Count kernel launches of an operation that bypasses the dispatcher."""
        self.launches[caller()] += number

    def wait(self, kind: str) -> None:
        """Count one wait of this kind."""
        self.waits[f"{caller()} ({kind})"] += 1

    def add(self, call: Call) -> None:
        """Count the launch and the wait of an operation, if it has them."""
        nothing_moves = call.name in COPIES and call.args[0].numel() == 0
        if nothing_moves or not (call.on_device or call.result_on_device):
            return
        kind = _wait_of(call)
        if kind:
            self.wait(kind)
        if not call.is_view and call.name not in _NOT_LAUNCHED:
            self.launch()


def _wait_of(call: Call) -> str:
    """Return the kind of wait that an operation causes; empty for none."""
    if call.name in _READS:
        return "read"
    lengths_unknown = call.overload == "repeat_interleave.Tensor" and call.kwargs.get("output_size") is None
    if call.name in _SHAPED_BY_VALUES or lengths_unknown:
        return "shape"
    if call.name in COPIES and call.source_on_device != call.result_on_device:
        if call.source_on_device:
            return "to host"
        return "" if call.kwargs.get("non_blocking") or True in call.args[2:3] else "to device"
    if call.name in INDEXING:
        indices = [index for index in call.args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "shape"
        if any(not isinstance(index, PretendTensor) for index in indices):
            return "to device"
    return ""


@cache
def _shown(file: str) -> str:
    """Return the displayed path of a file of the counted packages; empty for any other file."""
    return Path(file).relative_to(ROOT).as_posix() if file.startswith(PACKAGES) else ""


def caller() -> str:
    """Return ``file:line`` of the innermost frame in editlab or its callbacks; ``elsewhere`` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        shown = _shown(name)
        if shown:
            return f"{shown}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
