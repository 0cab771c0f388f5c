"""Writing a language model as a folder that transformers can load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.precision import dtype_name
from editlab.lm.quantized import is_quantized

SHARD = "5GB"
"""Size above which the weights are split into several files."""


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str = SHARD) -> None:
    """Write safetensors, configuration, generation settings and tokenizer into ``folder``, which must exist.

    All files have the permissions that the umask gives.
    """
    # Transformers 5 cannot undo the conversion by which it has read 4- and 8-bit weights, and need not.
    as_loaded: dict[str, Any] = {"save_original_format": False} if is_quantized(model) else {}
    model.save_pretrained(folder, max_shard_size=max_shard_size, **as_loaded)
    tokenizer.save_pretrained(folder)
    # safetensors makes its files readable by the owner only, whatever the umask.
    for file in folder.glob("*.safetensors"):
        copy_permissions(file, folder / "config.json")


def copy_permissions(file: Path, like: Path) -> None:
    """Give ``file`` the permissions of ``like``."""
    os.chmod(file, like.stat().st_mode)


def move(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move ``model`` to a device; a model with 4- or 8-bit weights stays on the device that it was loaded on."""
    if not is_quantized(model):
        model.to(device)  # type: ignore[arg-type]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the weights of ``model`` to ``dtype`` in place.

    Raises:
        UserError: A weight is too large for that type, or weights are quantized.
    """
    if model.dtype == dtype:
        return
    if is_quantized(model):
        raise UserError(
            f"--dtype is {dtype_name(dtype)}, and a model with 4- or 8-bit weights keeps the type of the others "
            f"({dtype_name(model.dtype)}): omit --dtype."
        )
    model.to(dtype)  # type: ignore[arg-type]
    if torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max:
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise UserError(f"{name} has weights too large for {dtype_name(dtype)}: choose bfloat16.")
