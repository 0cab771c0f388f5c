"""Matrix products of some blocks, and of the head, in bfloat16, with everything between in the model's own type.

CPUs with AMX multiply bfloat16 matrices several times as fast as float32 ones, those with AVX-512's bfloat16 twice as
fast. The weights are rounded once, not at each product; the residual stream, norms and attention keep their type, so
errors do not add up over the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from editlab.lm.probe import LinearMap, linear_maps
from editlab.lm.runner import ModelRunner
from editlab.utils.compat import replace_parameters

MATMULS = ("auto", "float32", "bfloat16")
"""How matrices may be multiplied; see :func:`products`."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the CPU has instructions for bfloat16 products (AMX or AVX-512's); False for any other device."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has no such function
    return device.type == "cpu" and any(map(capabilities.get, ("amx_bf16", "avx512_bf16")))


def type_of_products(matmul: str, device: torch.device) -> str:
    """What ``matmul`` comes to on a device: ``float32`` or ``bfloat16``."""
    if matmul == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    return matmul


def products(
    matmul: str, blocks: Sequence[nn.Module], edit_path: str, device: torch.device, head: nn.Module | None = None
) -> AbstractContextManager:
    """Products of ``blocks`` and ``head`` as a setting wants them: :func:`bfloat16_products`, or as they are.

    Args:
        matmul: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the CPU has instructions for it.
        blocks: blocks of the model.
        edit_path: path of the MLP's output projection in a block.
        device: where the model is.
        head: the map to the logits, where it shall be among them.
    """
    if type_of_products(matmul, device) == "float32":
        return nullcontext()
    return bfloat16_products(blocks, edit_path, head)


def products_above(lm: ModelRunner, layer: int, matmul: str, head: bool = False) -> AbstractContextManager:
    """Matrix products of all blocks above ``layer`` as ``matmul`` says; the blocks up to it stay in full precision.

    Args:
        lm: the model.
        layer: the highest block that is left alone.
        matmul: ``float32``, ``bfloat16`` or ``auto``, as for :func:`products`.
        head: whether the map to the logits is included. That is faster in training, but too coarse to compare answers.
    """
    above = list(lm.anatomy.blocks)[layer + 1 :]
    return products(matmul, above, lm.anatomy.edit_path, lm.device, lm.anatomy.head if head else None)


@contextmanager
def bfloat16_products(blocks: Sequence[nn.Module], edit_path: str, head: nn.Module | None = None) -> Iterator[None]:
    """The float32 linear maps of ``blocks`` multiply in bfloat16 inside the ``with``; others are left alone.

    Inputs are rounded and outputs given back in float32. Only what the MLP's first maps give stays in bfloat16: it
    goes through the activation to the output projection, which would round it anyway.

    Args:
        blocks: blocks of the model.
        edit_path: path of the MLP's output projection in a block (:attr:`Anatomy.edit_path`).
        head: the map to the logits, where it is to be rounded too. Embeddings tied to it stay as they are.
    """
    shared = _Rounded()
    mlp = edit_path.rpartition(".")[0]
    inner = [(path, module) for block in blocks for path, module in linear_maps(block).items()]
    with ExitStack() as stack:
        for path, module in [*inner, *([("", head)] if isinstance(head, LinearMap) else [])]:
            if module.weight.dtype != torch.float32 or module.weight.is_meta:
                continue
            stack.callback(replace_parameters, module, {k: p for k, p in module.named_parameters(recurse=False)})
            rounded = {k: p.detach().bfloat16() for k, p in module.named_parameters(recurse=False)}
            replace_parameters(module, {k: nn.Parameter(p, requires_grad=False) for k, p in rounded.items()})
            stack.callback(module.register_forward_pre_hook(shared.round_input).remove)
            if path == edit_path or not mlp or path.rpartition(".")[0] != mlp:
                stack.callback(module.register_forward_hook(_give_float32).remove)
        yield


class _Rounded:
    """Rounds inputs; maps that read one tensor (queries, keys, values) share its rounded copy."""

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.copy: Tensor | None = None

    def round_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.of is not args[0]:
            self.of, self.copy = args[0], args[0].bfloat16()
        return (self.copy, *args[1:])


def _give_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()
