"""Memory: whether a model fits, how much is left next to it, and what to do if a pass does not fit.

A model that does not fit is refused before its weights are read: a killed process prints no message.
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
    """Return the bytes of a causal model's weights in ``dtype``, tied ones counted once, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def require_memory(what: str, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make sure that ``needed`` bytes of weights in ``dtype`` fit on a device whose free memory is known.

    Raises:
        EditLabError: They do not.
    """
    free = free_memory(device)
    if free is None or needed <= free:
        return
    place = "memory" if device.type == "cpu" else f"the memory of {device}"
    mends = ["take a smaller model"]
    if device.type != "cpu":
        mends.insert(0, "spread it by model.device_map auto")
    if dtype.itemsize > 2:
        mends.insert(0, f"set trainer.precision to bf16-true ({needed * 2 / dtype.itemsize / _GIB:.1f} GiB)")
    raise EditLabError(
        f"the weights of {what} take {needed / _GIB:.1f} GiB in {dtype_name(dtype)}, and {free / _GIB:.1f} GiB of "
        f"{place} are free: {', or '.join(mends)}"
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, swap included; None for a device that does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    of_machine = psutil.virtual_memory().available + psutil.swap_memory().free
    of_container = _free_in_container()
    return of_machine if of_container is None else min(of_machine, of_container)


def room_beside(model: nn.Module, reserved: int = 0) -> int | None:
    """Bytes of the GPUs on which a model lies that its weights leave; None where it lies on none.

    The sizes of the GPUs count and not what is free now, so that one machine always gives the same answer.

    Args:
        model: the model.
        reserved: bytes of what else stays on these GPUs, such as the metrics' factors.
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
"""Parts of messages of which each means that memory did not suffice."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, a GPU's or the machine's."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in text for part in _OUT_OF_MEMORY)


def release() -> None:
    """Give back what is no longer used, after work that ran out of memory.

    To be called outside of the ``except`` that caught the error: while an error is handled, its traceback holds on to
    what had been allocated.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def by_halves(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """What ``work`` gives for the items; where memory does not hold them all at once, for one half after the other.

    Halves are halved again where they do not fit either.

    Raises:
        Exception: what ``work`` raised, where one item alone does not fit, or where memory was not what it lacked.
    """
    try:
        return work(items)
    except Exception as error:
        if not lacks_memory(error) or len(items) < 2:
            raise
    release()
    half = len(items) // 2
    log.warning("Memory does not hold %d rows at once: they go through by halves, which takes longer", len(items))
    return [*by_halves(work, items[:half]), *by_halves(work, items[half:])]


def _free_in_container() -> int | None:
    """Return the bytes below a container's own limit (control groups, version 2), or None; psutil does not know it."""
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    kept = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    # The page cache counts as used, and is given up on demand.
    return int(limit.read_text()) - int(used.read_text()) + int(kept.get("inactive_file", 0))
