"""The device of the closed form, which needs float64 and memory for its matrices; not every accelerator has both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from editlab.errors import UserError

AUTO = "auto"
"""The setting that leaves the choice to :func:`choose_device`."""
FEWEST_UNITS = 64
"""A GPU with fewer float64 units multiplies float64 matrices more slowly than the CPU of a desktop computer."""
_DATA_CENTER = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with 32 or 64 float64 units in each multiprocessor; all others have 2."""
_SPARE = 2
"""Number of temporary matrices of the largest size while a metric is computed."""


def require_setting(setting: str) -> None:
    """Makes sure that ``model.solver_device`` is a device with float64, or ``auto``.

    Raises:
        UserError: It is not.
    """
    if setting == AUTO:
        return
    try:
        device = torch.device(setting)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"model.solver_device is {setting!r}: set it to auto, cpu, or a CUDA device such as cuda:0.")


def choose_device(
    setting: str, model_device: torch.device, shapes: Sequence[Sequence[int]], room: int | None
) -> torch.device:
    """The device of keys, residuals and metrics.

    ``auto`` is the model's device, or the CPU if that device has no float64 (Apple's MPS), multiplies float64 slowly
    (:data:`FEWEST_UNITS`), or lacks memory for the metrics. The answer depends on the machine and not on what else
    runs on it, so that a resumed run solves on the same device.

    Args:
        setting: ``model.solver_device``.
        model_device: device of the model's inputs.
        shapes: shape of C0 of each edited layer, [d_k, d_k] or [experts, features, features].
        room: bytes of the model's devices that its weights leave free; None if unknown.
    """
    if setting != AUTO:
        return torch.device(setting)
    cpu = torch.device("cpu")
    if model_device.type != "cuda" or _float64_units(model_device) < FEWEST_UNITS:
        return cpu
    # Half of the room: values and evaluations need the rest.
    fits = room is None or metric_bytes(shapes) + _SPARE * max(metric_bytes([shape]) for shape in shapes) <= room // 2
    return model_device if fits else cpu


def metric_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of one float64 tensor for each layer."""
    return sum(8 * math.prod(shape) for shape in shapes)


def _float64_units(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    each = 64 if (properties.major, properties.minor) in _DATA_CENTER else 2
    return int(properties.multi_processor_count) * each
