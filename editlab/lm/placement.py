"""Models on several devices: the device on which a module runs, and its weights if they are offloaded.

Hugging Face accelerate puts a hook on each module of such a model, which moves inputs (and offloaded weights) to the
device that the module runs on. Accelerate need not be installed for models on one device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from editlab.errors import UserError
from editlab.utils.compat import offload_hook, replace_parameters

DeviceMap = str | dict[str, int | str]
"""transformers' ``device_map``: ``auto``, ``balanced``, ``sequential``, a device, or module path -> device."""


def device_named(name: str) -> torch.device:
    """Return the device of a ``--device`` argument, such as ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        UserError: There is no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}: give cpu, cuda, cuda:<number> or mps.") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise UserError(f"--device is {name!r}, and PyTorch finds no such device here: give --device cpu.")
    return device


def runs_on(module: nn.Module) -> torch.device:
    """Return the device that a module runs on; the weights of an offloaded module are stored elsewhere."""
    device = getattr(offload_hook(module), "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


def load_offloaded(module: nn.Module) -> None:
    """Move an offloaded module's own weights permanently to its device, so that changes of them persist.

    Raises:
        UserError: The weights are offloaded as part of a larger module.
    """
    hook = offload_hook(module)
    if getattr(hook, "offload", False):
        hook.pre_forward(module)
        hook.offload = False
        for name, weight in module.named_parameters(recurse=False):
            # The loaded weight may be the offloaded original itself, or a file that must not be written to.
            replace_parameters(module, {name: nn.Parameter(weight.detach().clone(), requires_grad=False)})
    if any(weight.is_meta for weight in module.parameters(recurse=False)):
        raise UserError(
            "An edited module's weights are offloaded together with other modules: place its block on a device."
        )


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and content of all parameters and persistent buffers, by name; offloaded ones are read one by one."""
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state may hold other objects, which are not weights
        if tensor.is_meta:
            path, _, last = name.rpartition(".")
            tensor = offload_hook(model.get_submodule(path)).weights_map[last]
        yield name, tensor
