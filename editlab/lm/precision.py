"""Data types of weights by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WEIGHTS = ("float32", "bfloat16", "float16", "float64")
"""Names of the types in which a model can be held and written."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the type of that name, one of :data:`WEIGHTS`.

    Raises:
        ValueError: The name is not one of them.
    """
    if name not in WEIGHTS:
        raise ValueError(f"{name!r} is none of {', '.join(WEIGHTS)}")
    found: torch.dtype = getattr(torch, name)
    return found


def cast_to(device: torch.device) -> str:
    """Return the type that autocast uses on a device (``trainer.precision: bf16-mixed``); empty if it is off."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return dtype_name(torch.get_autocast_dtype(device.type))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the ``with``, new tensors have the type ``dtype`` by default; also a decorator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
