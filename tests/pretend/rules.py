"""Restrictions of an accelerator that a CPU does not have: mixed devices and missing data types."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.pretend.tensor import COPIES, INDEXING, Call, PretendTensor

WIDE = (torch.float64, torch.complex128)


class DeviceRuleError(RuntimeError):
    """Raised for an operation that the accelerator would reject."""


def check(call: Call, device: torch.device) -> None:
    """Raise the accelerator's error for an operation, as far as its arguments determine it.

    Raises:
        DeviceRuleError: Tensors of two devices are mixed, or a CPU generator is used on the device.
    """
    for fault in _faults(call, device):
        raise DeviceRuleError(f"{call.name}: {fault}")


def check_types(call: Call, result: Tensor, device: torch.device) -> None:
    """Raise an error if a float64 tensor would be created or cast on a device without float64.

    Raises:
        TypeError: The same error as that of Apple's MPS.
    """
    cast_there = call.name in COPIES and call.source_on_device and result.dtype not in {x.dtype for x in call.tensors}
    if result.dtype in WIDE and (call.result_on_device or cast_there):
        raise TypeError(
            f"{call.name}: Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 "
            f"({device})."
        )


def _faults(call: Call, device: torch.device) -> Iterator[str]:
    generator = call.kwargs.get("generator")
    if call.result_on_device and generator is not None and generator.device.type == "cpu":
        yield f"Expected a '{device.type}' device type for generator but found 'cpu'"
    if not (call.on_device and call.on_cpu) or call.name in COPIES:
        return
    if call.name in INDEXING:
        yield from _indexing_faults(call, device)
    elif not _mixes_only_scalars(call):
        shapes = [f"{device}{list(x.shape)}" for x in call.on_device] + [f"cpu{list(x.shape)}" for x in call.on_cpu]
        yield f"Expected all tensors to be on the same device, but found {', '.join(shapes)}"


def _indexing_faults(call: Call, device: torch.device) -> Iterator[str]:
    """Yield the faults of indexing: a device tensor accepts CPU indices, and CPU values only without dimensions."""
    if not isinstance(call.args[0], PretendTensor):
        yield f"indices or values on {device} with an indexed tensor on the cpu"
    elif any(not isinstance(values, PretendTensor) and values.dim() > 0 for values in call.args[2:3]):
        yield "Expected all tensors to be on the same device, values are on cpu"


def _mixes_only_scalars(call: Call) -> bool:
    """Return whether the CPU tensors are scalars, which pointwise operations on the device accept as numbers."""
    numbers = all(x.dim() == 0 for x in call.on_cpu)
    into_cpu = any(not isinstance(x, PretendTensor) for x in call.written)
    pointwise = torch.Tag.pointwise in call.function.tags or call.name == "fill_"
    return pointwise and numbers and not into_cpu
