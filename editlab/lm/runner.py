"""A transformers model with its anatomy and a uniform call; the basis of packing and prefix caching."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editlab.lm.anatomy import Anatomy, read_anatomy
from editlab.lm.placement import runs_on
from editlab.lm.quantized import is_quantized


class ModelRunner(nn.Module):
    """Runs a transformers model on token ids.

    Args:
        model: any causal language model of transformers.
        edit_module: path of the module to edit inside a block; default: found by structure.
        placed: the model stays on its devices when this module is moved.

    Raises:
        UserError: The model has no such module.
    """

    packs: bool = False
    """whether rows may be packed (:mod:`editlab.lm.packing`)"""

    def __init__(self, model: PreTrainedModel, edit_module: str | None = None, placed: bool = False) -> None:
        super().__init__()
        self.placed = placed or getattr(model, "hf_device_map", None) is not None or is_quantized(model)
        self.model = model
        self.anatomy: Anatomy = read_anatomy(model, edit_module)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def _apply(self, fn: Any, recurse: bool = True) -> ModelRunner:
        # The Trainer moves its module to one device and type; a model that a device_map has placed stays where it is,
        # and so does a quantized one, which transformers puts on its device when it is loaded.
        return self if self.placed else super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, on which token ids must be."""
        return runs_on(self.model.get_input_embeddings())

    def run(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, **arguments: Any) -> Any:
        """Call the model's own forward.

        Args:
            ids: token ids, long [rows, tokens].
            mask: attention mask, long [rows, cached tokens + tokens]; default: the model attends to every token.
            positions: position ids, long [rows, tokens]; passed only to models that take them.
            **arguments: passed on to the model.

        Returns:
            The model's output.
        """
        if positions is not None and self._takes_positions:
            arguments["position_ids"] = positions.to(self.device)
        if mask is not None:
            arguments["attention_mask"] = mask.to(self.device)
        arguments.setdefault("use_cache", False)
        return self.model(input_ids=ids.to(self.device), **arguments)
