"""Memory checks: whether a model fits, how much memory it leaves free, and smaller passes if one does not fit.

A model that does not fit is rejected before its weights are read, because a process that is killed for its memory use
prints no message.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from editlab.errors import EditLabError
from editlab.lm.precision import dtype_name

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a causal model's weights in ``dtype``, counting tied weights once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def require_memory(what: str, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check that ``needed`` bytes of weights in ``dtype`` fit on a device, if its free memory is known.

    Raises:
        EditLabError: They do not fit.
    """
    free = free_memory(device)
    if free is None or needed <= free:
        return
    place = "memory" if device.type == "cpu" else f"the memory of {device}"
    fixes = ["choose a smaller model"]
    if device.type != "cpu":
        fixes.insert(0, "distribute it by model.device_map auto")
    if dtype.itemsize > 2:
        fixes.insert(0, f"set trainer.precision to bf16-true ({needed * 2 / dtype.itemsize / _GIB:.1f} GiB)")
    raise EditLabError(
        f"the weights of {what} take {needed / _GIB:.1f} GiB in {dtype_name(dtype)}, but only {free / _GIB:.1f} GiB "
        f"of {place} are free: {', or '.join(fixes)}"
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, including swap; None for a device that does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    of_machine = psutil.virtual_memory().available + psutil.swap_memory().free
    of_container = _free_in_container()
    return of_machine if of_container is None else min(of_machine, of_container)


def spare_gpu_memory(model: nn.Module, reserved: int = 0) -> int | None:
    """Return the bytes of a model's GPUs that its weights do not use; None if the model is not on a GPU.

    It is computed from the total memory of the GPUs, not from the free memory, so that it is the same in every run.

    Args:
        model: the model.
        reserved: bytes of other data that stay on these GPUs, such as the metrics' factors.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if not devices:
        return None
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.device in devices)
    return sum(torch.cuda.get_device_properties(device).total_memory for device in devices) - weights - reserved


_OUT_OF_MEMORY = (
    "not enough memory",
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # from a kernel, past PyTorch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",  # MPS, from Metal itself
)
"""Parts of error messages, each of which means that memory was insufficient."""


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of a GPU or of the machine was insufficient."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in text for part in _OUT_OF_MEMORY)


def release() -> None:
    """Free unused memory, after work that ran out of memory.

    Call it outside of the ``except`` that caught the error: while an error is handled, its traceback keeps references
    to the allocated tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def by_halves(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """Return the results of ``work`` for the items; if memory is insufficient, process the two halves in turn.

    Halves that do not fit are divided again.

    Raises:
        Exception: The error of ``work``, if a single item does not fit or if the error has another cause than memory.
    """
    try:
        return work(items)
    except Exception as error:
        if not lacks_memory(error) or len(items) < 2:
            raise
    release()
    half = len(items) // 2
    log.warning("Memory is insufficient for %d rows at once: they are processed by halves, which is slower", len(items))
    return [*by_halves(work, items[:half]), *by_halves(work, items[half:])]


def _free_in_container() -> int | None:
    """Return the bytes that are free below a container's limit (cgroups v2), which psutil ignores; None if no limit."""
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    kept = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    # The page cache counts as used, but is freed on demand.
    return int(limit.read_text()) - int(used.read_text()) + int(kept.get("inactive_file", 0))
