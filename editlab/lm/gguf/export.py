"""Exporting a model as a GGUF file that is read back and compared before it is kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.lm.gguf.check import compare
from editlab.lm.gguf.write import write_copy, write_new

FILE = "model.gguf"
"""Name of the file in the folder of an export."""


@dataclass(frozen=True)
class Origin:
    """The file that an edited model comes from, and what was changed."""

    source: Path | None
    """GGUF file from which the base model was loaded; None for a model from a folder or the hub"""
    changed: Collection[str]
    """names of the parameters whose weights differ from the base model's"""
    dtype: torch.dtype
    """type in which the base model was held"""


def export_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
    about: str,
    prompts: Sequence[str] = (),
) -> None:
    """Write a model to ``file``, read it back, and require that nothing was lost.

    A model that came from a GGUF file is written as a copy of it, in which only the changed tensors are replaced, in
    the type of ``model``. Any other one is written anew.

    Args:
        file: the file to write.
        model: the edited model, on the CPU, in the type of the weights to write.
        tokenizer: its tokenizer.
        origin: where it comes from.
        about: the description that the file gets.
        prompts: texts for the comparison.

    Raises:
        UserError: The model or its tokenizer cannot be written as GGUF, or reading the file gives something else.
    """
    dtype = model.dtype
    weights = {name: weight for name, weight in model.state_dict().items()}
    if origin.source is not None:
        write_copy(origin.source, file, model, origin.changed, dtype, about)
    else:
        write_new(file, model, tokenizer, dtype, about)

    def is_written(name: str, read: Tensor) -> bool:
        if origin.source is not None and name not in origin.changed:  # its blocks are more exact than the run's model
            read = read.to(origin.dtype).to(dtype)
        return torch.equal(read, weights[name].to(read.dtype))

    compare(file, model, tokenizer, is_written, prompts)
