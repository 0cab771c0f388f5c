"""Matrix products in bfloat16 for some blocks and the head; all other operations keep the model's data type.

CPUs with AMX multiply bfloat16 matrices several times as fast as float32 matrices, and CPUs with AVX-512's bfloat16
instructions twice as fast. The weights are rounded once, not at each product; the residual stream, norms and attention
keep their data type, so errors do not accumulate over the blocks.
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
"""Allowed values of the setting ``matmul``; see :func:`products`."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the CPU has instructions for bfloat16 products (AMX or AVX-512); False for any other device."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has no such function
    return device.type == "cpu" and any(map(capabilities.get, ("amx_bf16", "avx512_bf16")))


def type_of_products(matmul: str, device: torch.device) -> str:
    """Return the data type that the setting ``matmul`` selects on a device: ``float32`` or ``bfloat16``."""
    if matmul == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    return matmul


def products(
    matmul: str, blocks: Sequence[nn.Module], edit_path: str, device: torch.device, head: nn.Module | None = None
) -> AbstractContextManager:
    """Apply the setting ``matmul`` to the matrix products of ``blocks`` and ``head`` inside the ``with``.

    Args:
        matmul: ``float32``, ``bfloat16``, or ``auto``, which is bfloat16 if the CPU has instructions for it.
        blocks: blocks of the model.
        edit_path: path of the MLP's output projection in a block.
        device: device of the model.
        head: the map to the logits; default: its products are not changed.
    """
    if type_of_products(matmul, device) == "float32":
        return nullcontext()
    return bfloat16_products(blocks, edit_path, head)


def products_above(lm: ModelRunner, layer: int, matmul: str, head: bool = False) -> AbstractContextManager:
    """Apply the setting ``matmul`` to all blocks above ``layer``; the blocks up to it stay in full precision.

    Args:
        lm: the model.
        layer: number of the highest block that stays in full precision.
        matmul: ``float32``, ``bfloat16`` or ``auto``, as for :func:`products`.
        head: whether to include the map to the logits, which is faster in training but too coarse to compare answers.
    """
    above = list(lm.anatomy.blocks)[layer + 1 :]
    return products(matmul, above, lm.anatomy.edit_path, lm.device, lm.anatomy.head if head else None)


@contextmanager
def bfloat16_products(blocks: Sequence[nn.Module], edit_path: str, head: nn.Module | None = None) -> Iterator[None]:
    """Make the float32 linear maps of ``blocks`` multiply in bfloat16 inside the ``with``; other maps are unchanged.

    Inputs are rounded to bfloat16, and outputs are converted to float32. Only the output of the MLP's first maps stays
    in bfloat16: it passes the activation to the output projection, which would round it anyway.

    Args:
        blocks: blocks of the model.
        edit_path: path of the MLP's output projection in a block (:attr:`Anatomy.edit_path`).
        head: the map to the logits; default: not rounded. Embeddings that are tied to it stay in float32.
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
    """Rounds inputs to bfloat16; maps with the same input (queries, keys, values) share its rounded copy."""

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.copy: Tensor | None = None

    def round_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.of is not args[0]:
            self.of, self.copy = args[0], args[0].bfloat16()
        return (self.copy, *args[1:])


def _give_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()
