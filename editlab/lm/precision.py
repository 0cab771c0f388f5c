"""Data types: their names, and their rounding errors on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WEIGHTS = ("float32", "bfloat16", "float16", "float64")
"""Names of the data types in which a model can be loaded and saved."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the data type with this name, one of :data:`WEIGHTS`.

    Raises:
        ValueError: The name is not one of them.
    """
    if name not in WEIGHTS:
        raise ValueError(f"{name!r} is none of {', '.join(WEIGHTS)}")
    found: torch.dtype = getattr(torch, name)
    return found


def has_float64(device: torch.device) -> bool:
    """Return whether a device supports float64 tensors; Apple's MPS does not."""
    return device.type != "mps"


def widened(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` as float64 on ``device``; it is moved first, because its present device may lack float64."""
    return tensor.to(device).double()


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative error of a matrix product in ``dtype`` on a device: twice the type's unit roundoff.

    Under autocast it is the error of the type that autocast computes in. float32 products on a GPU are rounded to TF32
    if the user has enabled it (``torch.set_float32_matmul_precision``), as Lightning advises.
    """
    if dtype == torch.float32:
        cast = cast_to(device)
        if cast:
            return torch.finfo(dtype_named(cast)).eps
        if device.type == "cuda" and _multiplies_in_tf32():
            return 2.0**-10
    return torch.finfo(dtype).eps


def _multiplies_in_tf32() -> bool:
    # Since torch 2.9 there are two settings, and the older one cannot be read if only the newer one was set.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    try:
        return newer == "tf32" or torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return False


def cast_to(device: torch.device) -> str:
    """Return the type that autocast uses on a device (``trainer.precision: bf16-mixed``); empty if it is off."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return dtype_name(torch.get_autocast_dtype(device.type))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default type of new tensors inside the ``with``; this is also a decorator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
