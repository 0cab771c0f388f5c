"""A LoRA adapter by PEFT on some linear maps of a model, which is in the model only while it is trained.

Between two trainings the model has its own modules: the adapter's effect is then a dense update of each map, which is
added to the weight or kept apart from it (:class:`~editlab.edits.edited_layer.EditedLayer`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editlab.lm.language_model import LanguageModel
from editlab.utils.rng import private_draws


class Adapter:
    """One adapter of PEFT (Hu et al. 2022, arXiv:2106.09685); its initial update is zero.

    Args:
        lm: the model.
        paths: paths in the model of the linear maps that get it.
        rank: rank of its update of each map.
        alpha: its update is scaled by alpha / rank.
        dropout: dropout on its inputs in training.
        seed: seed of its initial factors.
    """

    def __init__(
        self, lm: LanguageModel, paths: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
    ) -> None:
        self.lm, self.paths, self.seed = lm, list(paths), seed
        transposed = isinstance(lm.model.get_submodule(self.paths[0]), Conv1D)
        self.config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.paths, fan_in_fan_out=transposed,  # type: ignore[arg-type]
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.factors: dict[str, Tensor] | None = None
        """its factors as PEFT's state dict, on the CPU; None before its first training"""

    @contextmanager
    def in_place(self) -> Iterator[PeftModel]:
        """Puts the adapter into the model inside the ``with``; afterwards the model has its own modules again.

        Only the adapter's dropout is in training mode: the model stays in eval mode.
        """
        with private_draws(self.seed):
            model = get_peft_model(self.lm.model, self.config)
        try:
            if self.factors is not None:
                set_peft_model_state_dict(model, self.factors)
            for part in _lora_layers(model).values():
                part.lora_dropout.train()
            yield model
        finally:
            model.unload()

    def updates(self, model: PeftModel) -> dict[str, Tensor]:
        """Path -> the adapter's dense update, float32 [d_v, d_k]; ``model`` is what :meth:`in_place` yields."""
        found = {}
        with torch.no_grad():
            for path, part in _lora_layers(model).items():
                added = part.get_delta_weight("default").float()
                found[path] = (added.T if self.config.fan_in_fan_out else added).contiguous()
        return found

    def state(self, model: PeftModel) -> dict[str, Tensor]:
        """The factors as trained so far, which can be set as :attr:`factors`."""
        # Otherwise PEFT queries a model hub for the size of the vocabulary.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Saves the adapter in PEFT's format (``adapter_config.json``, safetensors), for use with the edited model."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary, self.in_place() as model:
            model.save_pretrained(temporary, save_embedding_layers=False)
            for file in sorted(Path(temporary).iterdir()):
                os.replace(file, folder / file.name)  # atomic: no reader sees half a file


def size_of_adapter(rank: int, weights: Sequence[Tensor], model: nn.Module) -> str:
    """A sentence with an adapter's number of parameters, next to those of its linear maps and of the whole model.

    Args:
        rank: rank of its update of each map.
        weights: weights of the maps that get it.
        model: the model that the maps are in.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    own, full = sum(rank * sum(weight.shape) for weight in weights), sum(weight.numel() for weight in weights)
    return (
        f"LoRA of rank {rank} on {len(weights)} linear maps: {own} trainable parameters, {100 * own / whole:.3f}% of "
        f"the model's (all of those maps: {full}, {100 * full / whole:.2f}%)"
    )


def parameters(model: PeftModel) -> list[nn.Parameter]:
    """The adapter's parameters: the only ones that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): part for n, part in model.named_modules() if isinstance(part, LoraLayer)}


def between(start: dict[str, Tensor], end: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Factors interpolated between two states; at fraction 1 exactly those of ``end``."""
    return {name: last if fraction == 1 else torch.lerp(start[name], last, fraction) for name, last in end.items()}
