"""Writing a language model as a folder that transformers can load."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.precision import dtype_name

SHARD = "5GB"
"""Size above which the weights are split into several files."""


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str = SHARD) -> None:
    """Write safetensors, configuration, generation settings and tokenizer into ``folder``, which must exist.

    All files have the permissions that the umask gives.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    # safetensors makes its files readable by the owner only, whatever the umask.
    for file in folder.glob("*.safetensors"):
        share(file, folder / "config.json")


def share(file: Path, like: Path) -> None:
    """Give ``file`` the permissions of ``like``."""
    os.chmod(file, like.stat().st_mode)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the weights of ``model`` to ``dtype`` in place.

    Raises:
        UserError: A weight is too large for that type.
    """
    if model.dtype == dtype:
        return
    model.to(dtype)  # type: ignore[arg-type]
    if torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max:
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise UserError(f"{name} has weights too large for {dtype_name(dtype)}: choose bfloat16.")
