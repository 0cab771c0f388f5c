"""Data types of weights by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WEIGHTS = ("float32", "bfloat16", "float16", "float64")
"""Those in which a model can be held and written."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the type of that name, one of :data:`WEIGHTS`.

    Raises:
        ValueError: There is no such type, or weights are not held in it.
    """
    if name not in WEIGHTS:
        raise ValueError(f"{name!r} is none of {', '.join(WEIGHTS)}")
    found: torch.dtype = getattr(torch, name)
    return found


def cast_to(device: torch.device) -> str:
    """The type that autocast computes in on a device, as under ``trainer.precision: bf16-mixed``; empty without it."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return dtype_name(torch.get_autocast_dtype(device.type))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it new tensors are of ``dtype`` where nothing else is said; also decorates a function."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
