"""The states of all random generators, as plain numbers and tensors that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, including those of GPUs in use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        **_torch_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators to a result of :func:`rng_state`; those of GPUs only if the number of GPUs is the same."""
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    _set_torch_states(state)


@contextmanager
def private_draws(seed: int) -> Iterator[None]:
    """Seed torch's generators with ``seed`` inside the ``with``, and restore their states afterwards."""
    before = _torch_states()
    # Not torch.manual_seed: it would also seed GPUs that this process does not use yet, at their first use.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        _set_torch_states(before)


@contextmanager
def restored_draws() -> Iterator[None]:
    """Restore the states of all generators after the ``with``, in which another program may seed or draw from them."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def _torch_states() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if _cuda_in_use() else []}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_torch_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def _cuda_in_use() -> bool:
    """Return whether this process already uses CUDA; reading the state of a GPU's generator would initialize it."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()
