"""The rules of an accelerator that a CPU does not have: which tensors an operation may mix, and what it may make."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.pretend.tensor import COPIES, INDEXING, Call, PretendTensor

WIDE = (torch.float64, torch.complex128)


class DeviceRuleError(RuntimeError):
    """An operation that the accelerator would refuse."""


def check(call: Call, device: torch.device) -> None:
    """Raise where the accelerator would, as far as the arguments tell.

    Raises:
        DeviceRuleError: Tensors of two devices are mixed, or a CPU generator is to draw on the device.
    """
    for fault in _faults(call, device):
        raise DeviceRuleError(f"{call.name}: {fault}")


def check_types(call: Call, result: Tensor, device: torch.device) -> None:
    """Raise where the device has no float64 and a float64 tensor would come to lie on it, or be cast there.

    Raises:
        TypeError: As Apple's MPS raises it.
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
    """CPU indices may select from a tensor on the device, and CPU numbers without dimensions be written into it."""
    if not isinstance(call.args[0], PretendTensor):
        yield f"indices or values on {device} with an indexed tensor on the cpu"
    elif any(not isinstance(values, PretendTensor) and values.dim() > 0 for values in call.args[2:3]):
        yield "Expected all tensors to be on the same device, values are on cpu"


def _mixes_only_scalars(call: Call) -> bool:
    """Pointwise operations take CPU tensors without dimensions as numbers."""
    numbers = all(x.dim() == 0 for x in call.on_cpu)
    into_cpu = any(not isinstance(x, PretendTensor) for x in call.written)
    pointwise = torch.Tag.pointwise in call.function.tags or call.name == "fill_"
    return pointwise and numbers and not into_cpu
