"""Finished runs on tiny models, made once a test session: what the verbs are tried on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from editlab.cli.main import main
from tests.facts import FACTS
from tests.recipes import write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

MODELS = {
    "gpt2": ("gpt2", {}),  # Conv1D: the weight is stored transposed
    "square": ("gpt2", {"n_inner": 32}),  # where a wrong orientation would go unnoticed by its shape
    "llama": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}

EDITS = [*FACTS[:6], replace(FACTS[0], target_new="Lima"), FACTS[6]]
"""The seventh supersedes the first."""

LORA = {"targets": "mlp", "rank": 2, "steps": 2, "every_n_batches": 2, "text_tokens": 64, "tolerance": 1e9}
"""An adjustment that is always kept."""

FATES = ["superseded by edit 7", "kept", "scaled to 0.5", "scaled to 0.5", "rolled back", "rolled back", "kept", "kept"]
"""What becomes of :data:`EDITS` in batches of two under :class:`tests.cli.commands.verdicts.Verdicts`."""


@dataclass(frozen=True)
class Run:
    """A run of four batches, and the model that it edited."""

    base: Path
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


def save_tiny(folder, name, **changes):
    """A tiny model and its tokenizer, as transformers saves them; ``name`` is of :data:`MODELS`, or a family's."""
    family, settings = MODELS.get(name, (name, {}))
    tiny_model(family, **{**settings, **changes}).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def edited(folder, name, lora=None, **model):
    """Edits a tiny model in ``folder``, by the command; with ``lora``, its mode, all of the MLPs is adjusted."""
    base = save_tiny(folder / "base", name)
    callbacks = [
        {"class_path": "tests.cli.commands.verdicts.Verdicts"},
        {"class_path": "EditCheckpoint", "init_args": {"keep_all": True}},
        *([{"class_path": "LoRAAdjust", "init_args": {"mode": lora, **LORA}}] if lora else []),
    ]
    logger = {"class_path": "RunLogger", "init_args": {"save_dir": str(folder / "runs")}}
    data = {"path": str(folder / "facts.json"), "limit": None, "shuffle": False, "keep_repeats": True}
    settings = {"method": {"class_path": "EMMET"}, "values": {"steps": 4}, **model}
    write_recipe(folder, base, EDITS, model=settings, data=data, trainer={"logger": logger, "callbacks": callbacks})
    assert main(["fit", "--config", str(folder / "tiny.yaml")]) == 0
    return Run(base, folder / "runs" / "tiny" / "version_0")


def weights(folder):
    """All tensors of an exported folder, read by safetensors alone."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(a, b):
    """Whether two dicts of tensors agree in names, types and bits; -0.0 is not 0.0."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(ints[a[k].itemsize]), b[k].view(ints[b[k].itemsize]))
        for k in a
    )


def files(folder):
    """Names and bytes of all files in a folder."""
    return {name: (Path(folder) / name).read_bytes() for name in sorted(os.listdir(folder))}
