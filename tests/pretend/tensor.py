"""Tensors on the simulated device, and an operation on them as PyTorch's dispatcher passes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAME = "pretend"
"""Name of the device in PyTorch's C++ code; Python code uses the name of the simulated accelerator."""

COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


def is_pretend(device: Any) -> bool:
    """Return whether a device, given as such or by name, is the simulated device."""
    return device is not None and torch.device(device).type == NAME


class PretendTensor(Tensor):
    """A tensor on the simulated device: a wrapper without its own memory around a CPU tensor with the content."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> PretendTensor:
        wrapper = Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, layout=content.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        wrapper.content = content
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tests.pretend.device import execute  # it needs this class

        return execute(function, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.content.__reduce_ex__(protocol)  # torch.save writes the content

    def __deepcopy__(self, memo: Any) -> PretendTensor:
        return PretendTensor(self.content.clone()).requires_grad_(self.requires_grad)

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.content!r} on the pretend device"


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested lists, tuples and dicts; PyTorch's tree walk has more containers, but is slower."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for one in x:
            yield from tensors_in(one)
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))


def with_tensors(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to each tensor in nested lists, tuples and dicts, and return the same structure."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        changed = [with_tensors(one, change) for one in x]
        return changed if isinstance(x, list) else tuple(changed)
    return {name: with_tensors(one, change) for name, one in x.items()} if isinstance(x, dict) else x


@cache
def _names(function: Any) -> tuple[str, str]:
    name = str(function.overloadpacket.__name__)
    return name, f"{name}.{function._overloadname}"


@cache
def _views(function: Any) -> bool:
    aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class Call:
    """One operation and its arguments.

    Attributes:
        name: name of the operation, such as ``add``.
        overload: its overload, such as ``add.Tensor``.
        tensors: all tensors among the arguments.
        on_device: tensors on the simulated device.
        on_cpu: tensors on the CPU.
        result_on_device: whether the result is on the simulated device.
        is_view: whether the result shares memory with an argument and nothing is computed.
    """

    def __init__(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.name, self.overload = _names(function)
        self.is_view = _views(function)
        self.tensors = [*tensors_in(args), *tensors_in(kwargs)]
        self.on_device = [x for x in self.tensors if isinstance(x, PretendTensor)]
        self.on_cpu = [x for x in self.tensors if not isinstance(x, PretendTensor)]
        if kwargs.get("device") is not None:
            self.result_on_device = is_pretend(kwargs["device"])
        elif self.name == "copy_":
            self.result_on_device = isinstance(args[0], PretendTensor)
        else:
            self.result_on_device = bool(self.on_device)

    @property
    def source_on_device(self) -> bool:
        """Whether the source of a copy is on the simulated device."""
        return isinstance(self.args[1 if self.name == "copy_" else 0], PretendTensor)

    @property
    def written(self) -> list[Tensor]:
        """Tensors that the operation writes into."""
        declared = zip(self.function._schema.arguments, self.args, strict=False)
        return [x for a, x in declared if a.alias_info and a.alias_info.is_write and isinstance(x, Tensor)]
