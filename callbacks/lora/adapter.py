"""A LoRA adapter by PEFT on some linear maps of a model: in place while it is trained, and out of the way otherwise.

Between two trainings the model's modules are its own: what the adapter adds is a dense update of each map, which is
added to the weight or kept beside it (:class:`~editlab.edits.edited_layer.EditedLayer`).
"""

from __future__ import annotations

import os
import re
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

from editlab.errors import UserError
from editlab.lm.anatomy import Anatomy
from editlab.lm.language_model import LanguageModel
from editlab.lm.probe import linear_maps
from editlab.utils.rng import private_draws

GROUPS = ("edited", "mlp", "attention")


def find_targets(anatomy: Anatomy, targets: str, layers: Sequence[int]) -> list[str]:
    """Paths in the model of the linear maps that an adapter goes to, layer by layer.

    Args:
        anatomy: of the model.
        targets: ``edited``: the MLP's output projection; ``mlp``: all maps of the MLP; ``attention``: those outside of
            it; or a regular expression that a path inside a block matches as a whole (``mlp[.](up|down)_proj``).
        layers: blocks, counted from 0.

    Raises:
        UserError: for a layer that is not there, an expression that is none, or one that matches nothing.
    """
    mlp = anatomy.edit_path.rpartition(".")[0]
    found: list[str] = []
    for layer in layers:
        if not 0 <= layer < len(anatomy.blocks):
            raise UserError(f"LoRAAdjust.layers names {layer}: the model's layers are 0 to {len(anatomy.blocks) - 1}.")
        paths = list(linear_maps(anatomy.blocks[layer]))
        if targets == "edited":
            chosen = [anatomy.edit_path]
        elif targets in GROUPS:
            chosen = [path for path in paths if (path.rpartition(".")[0] == mlp) == (targets == "mlp")]
        else:
            chosen = [path for path in paths if _expression(targets).fullmatch(path)]
        if not chosen:
            raise UserError(
                f"LoRAAdjust.targets is {targets!r}, which names no linear map of layer {layer}: say "
                f"{', '.join(GROUPS)}, or match some of {', '.join(paths)}."
            )
        found += [f"{anatomy.block_path}.{layer}.{path}" for path in chosen]
    return found


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"LoRAAdjust.targets is {text!r}, which is no regular expression ({error}).") from error


class Adapter:
    """One adapter, as PEFT makes it (Hu et al. 2022, arXiv:2106.09685): it starts out adding nothing.

    Args:
        lm: the model that it is for.
        paths: of its linear maps in the model.
        rank: of what it adds to each.
        alpha: what it adds is scaled by alpha / rank.
        dropout: on its inputs, while it is trained.
        seed: of its first factors.
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
        """PEFT's state of it, on the CPU; None before its first training"""

    @contextmanager
    def in_place(self) -> Iterator[PeftModel]:
        """The model with the adapter in it, which is trained in the ``with``; afterwards the model's modules are back.

        Dropout is on in the adapter alone: the model stays in eval mode.
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
        """What it adds to each map, by path: float32 [d_v, d_k]; ``model`` is what :meth:`in_place` gave."""
        found = {}
        with torch.no_grad():
            for path, part in _lora_layers(model).items():
                added = part.get_delta_weight("default").float()
                found[path] = (added.T if self.config.fan_in_fan_out else added).contiguous()
        return found

    def state(self, model: PeftModel) -> dict[str, Tensor]:
        """The factors as they are trained now; as :attr:`factors` they are taken up again."""
        # With embeddings to be looked for, PEFT would ask a hub whether the vocabulary has grown.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Writes it in PEFT's format (``adapter_config.json``, safetensors), for the model without it."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary, self.in_place() as model:
            model.save_pretrained(temporary, save_embedding_layers=False)
            for file in sorted(Path(temporary).iterdir()):
                os.replace(file, folder / file.name)  # whole, or not there


def parameters(model: PeftModel) -> list[nn.Parameter]:
    """The adapter's own, which alone are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): part for n, part in model.named_modules() if isinstance(part, LoraLayer)}


def between(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Factors that lie a share of the way from some to others, which are given back as they are at share 1."""
    return {name: last if share == 1 else torch.lerp(start[name], last, share) for name, last in end.items()}
