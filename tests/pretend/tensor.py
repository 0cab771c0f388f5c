"""Tensors on the pretend device, and one operation on them as PyTorch's dispatcher passes it on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NAME = "pretend"
"""Name of the device inside PyTorch's C++ code; Python code sees the name of the accelerator that it stands for."""

COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


def is_pretend(device: Any) -> bool:
    """Whether a device, or the name of one, is the pretend device."""
    return device is not None and torch.device(device).type == NAME


class PretendTensor(Tensor):
    """A tensor on the pretend device: a wrapper without memory of its own around a CPU tensor with the content."""

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


@dataclass
class Call:
    """One operation and its arguments."""

    function: Any
    args: Any
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as ``add``."""
        return str(self.function.overloadpacket.__name__)

    @property
    def overload(self) -> str:
        """Such as ``add.Tensor``."""
        return f"{self.name}.{self.function._overloadname}"

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    @cached_property
    def on_device(self) -> list[PretendTensor]:
        """Those on the pretend device."""
        return [x for x in self.tensors if isinstance(x, PretendTensor)]

    @cached_property
    def on_cpu(self) -> list[Tensor]:
        """The others."""
        return [x for x in self.tensors if not isinstance(x, PretendTensor)]

    @cached_property
    def result_on_device(self) -> bool:
        """Whether the result lies on the pretend device."""
        if self.kwargs.get("device") is not None:
            return is_pretend(self.kwargs["device"])
        if self.name == "copy_":
            return isinstance(self.args[0], PretendTensor)
        return bool(self.on_device)

    @cached_property
    def source_on_device(self) -> bool:
        """Of a copy: whether what is copied lies on the pretend device."""
        return isinstance(self.args[1 if self.name == "copy_" else 0], PretendTensor)

    @property
    def written(self) -> list[Tensor]:
        """Tensors that the operation writes into."""
        declared = zip(self.function._schema.arguments, self.args, strict=False)
        return [x for a, x in declared if a.alias_info and a.alias_info.is_write and isinstance(x, Tensor)]

    @property
    def is_view(self) -> bool:
        """Whether the result shares memory with an argument and nothing is computed."""
        aliases = [r.alias_info for r in self.function._schema.returns if r.alias_info is not None]
        return bool(aliases) and not any(alias.is_write for alias in aliases)
