"""Models with 4- or 8-bit weights: the maps that are edited get weights in full precision.

An update is smaller than the steps between two quantized weights, so it would be lost in them. Before a quantized map
is edited, a plain map takes its place whose weights are what the quantized one computes: its outputs for unit vectors.
All other maps stay quantized. No kind of quantization is named here; those of bitsandbytes are tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editlab.errors import UserError

_SAME = 0.1
"""Relative error up to which two gradients count as equal; the 8-bit products of bitsandbytes have up to 0.05."""
_ROWS = 1024
"""Number of unit vectors that a map is applied to at once."""


def has_narrow_weight(module: nn.Module) -> bool:
    """Return whether a module's weight has fewer than 16 bits, or is not a floating-point number."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.itemsize < 2)


def is_quantized(model: nn.Module) -> bool:
    """Return whether some linear map of a model has quantized weights."""
    return any(isinstance(part, nn.Linear) and has_narrow_weight(part) for part in model.modules())


def in_full_precision(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the map at ``path`` in a model; a quantized one is replaced by a plain one in the model's type.

    The model's configuration then lists it among the maps that are not quantized, so that the model can be saved.

    Raises:
        UserError: It has no gradients, or wrong ones, so that values cannot be found in such a model.
    """
    module = model.get_submodule(path)
    if not (isinstance(module, nn.Linear) and has_narrow_weight(module)):
        return module
    weight = _weight_of(module, model.dtype)
    _require_gradient(module, weight, path)
    # bitsandbytes puts a Linear in place of GPT-2's Conv1D, and transformers notes the class that it replaced.
    transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    with torch.device("meta"):  # where the initial weights need no random draws
        plain: Any = (
            Conv1D(module.out_features, module.in_features)
            if transposed
            else nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        )
    weight = weight.T.contiguous() if transposed else weight
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(weight), requires_grad=False)
    elif getattr(plain, "bias", None) is not None:
        plain.bias = nn.Parameter(weight.new_zeros(module.out_features), requires_grad=False)
    model.set_submodule(path, plain.train(module.training))
    _keep_out(model, path)
    return plain


@torch.no_grad()
def _weight_of(module: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weights [d_out, d_in] that a map computes with."""
    device = module.weight.device
    constant = module(torch.zeros(1, module.in_features, dtype=dtype, device=device))
    columns = []
    for start in range(0, module.in_features, _ROWS):
        size = min(_ROWS, module.in_features - start)
        units = torch.zeros(size, module.in_features, dtype=dtype, device=device)
        units[:, start : start + size] = torch.eye(size, dtype=dtype, device=device)
        columns.append((module(units) - constant).T)
    return torch.cat(columns, 1).to(dtype).contiguous()


def _require_gradient(module: nn.Linear, weight: Tensor, path: str) -> None:
    """Compare the gradient of a map's output by its input with the one that its weights have."""
    signs = 1 - 2 * (torch.arange(module.out_features, device=weight.device) % 2).to(weight.dtype)
    with torch.enable_grad():
        entered = torch.ones(2, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        try:
            (gradient,) = torch.autograd.grad((module(entered) * signs).sum(), entered)
        except RuntimeError:  # there is none
            gradient = torch.zeros_like(entered)
    expected = (signs @ weight).expand_as(gradient)
    if (gradient - expected).float().norm() > _SAME * expected.float().norm():
        raise UserError(
            f"The quantized map {path} has no gradient or a wrong one on {weight.device}, so values cannot be found: "
            "name the model in model.language_model, so that editlab loads it, or use a GPU or full precision."
        )


def _keep_out(model: PreTrainedModel, path: str) -> None:
    """Add a map to those that the model's configuration keeps out of the quantization."""
    how: Any = getattr(model.config, "quantization_config", None)
    if hasattr(how, "llm_int8_skip_modules"):
        # Without a list of its own, a model keeps out those that transformers chooses, such as the output embeddings.
        effective = getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None)
        kept = effective if how.llm_int8_skip_modules is None else how.llm_int8_skip_modules
        how.llm_int8_skip_modules = sorted({*(kept or []), path})


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with bfloat16 instructions.

    Its products of packed weights have wrong gradients (bitsandbytes 0.50.2), and the weights change in memory.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
