"""Whether a model fits into memory, said before its weights are read: a killed process says nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from editlab.errors import EditLabError
from editlab.lm.dtypes import dtype_name

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a causal model's weights in ``dtype``, tied ones counted once; nothing is read or allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def require_memory(what: str, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make sure that ``needed`` bytes of weights in ``dtype`` fit on a device, as far as it tells what is free.

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
    """Bytes that are free on a device, swap included; None where that can not be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines()}
    of_machine = fields.get("MemAvailable", fields["MemFree"]) + fields.get("SwapFree", 0)
    of_container = _free_in_container()
    return of_machine if of_container is None else min(of_machine, of_container)


def _free_in_container() -> int | None:
    """Bytes that a container's own limit leaves (control groups, version 2); None where there is no limit."""
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    kept = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    # Files that were read count as used, and give way.
    return int(limit.read_text()) - int(used.read_text()) + int(kept.get("inactive_file", 0))
