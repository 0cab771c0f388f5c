"""The common part of export, apply and revert: their arguments, and writing a model as a folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.gguf.export import FILE as GGUF
from editlab.lm.gguf.export import Origin, export_gguf
from editlab.lm.gguf.write import require_kind
from editlab.lm.loading.load import gguf_source
from editlab.lm.placement import device_named
from editlab.lm.precision import WEIGHTS, dtype_name, dtype_named
from editlab.lm.save import SHARD, cast, copy_permissions, move, save
from editlab.runs.delta import FILE, Delta
from editlab.runs.edit_log import EDITS
from editlab.runs.model_card import delta_card, edited_card, gguf_card, reverted_card
from editlab.runs.patched_model import PATCH
from editlab.runs.summary import counted
from editlab.utils.files import atomic_folder, shown_path

log = logging.getLogger(__name__)

_PROMPTS = 4
"""Prompts of edits on which a GGUF file and its model must agree."""


def add_checkpoint_arguments(parser: ArgumentParser, others: str = "") -> None:
    """Adds the arguments that name an edited model; ``others``: what may be named apart from a run's checkpoint."""
    parser.add_argument(
        "--ckpt_path",
        required=True,
        help=f"A checkpoint, or a run's folder, which means its checkpoints/last.ckpt{others}.",
    )
    parser.add_argument("--model", help="Name or path of the base model, if it has moved since the run.")


def add_device_argument(parser: ArgumentParser) -> None:
    """Adds the argument that names the model's device."""
    parser.add_argument("--device", default="cpu", help="Device of the model: cpu, cuda, cuda:1 or mps.")


def add_writing_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that say where and how a model is written."""
    add_out_argument(parser)
    parser.add_argument("--dtype", choices=WEIGHTS, help="Type of the weights. Default: that of the run.")
    add_device_argument(parser)
    parser.add_argument(
        "--max_shard_size", default=SHARD, help="Largest size of a file of weights; larger ones are split."
    )


def add_out_argument(parser: ArgumentParser) -> None:
    """Adds the argument that names the folder to write."""
    parser.add_argument("--out", required=True, help="Folder to write: a new or an empty one.")


@dataclass(frozen=True)
class Writing:
    """The folder, dtype and device with which a model is written."""

    out: Path
    dtype: torch.dtype | None
    """type of the weights; None for the run's"""
    max_shard_size: str
    device: torch.device
    """device on which updates are added to the weights"""

    @classmethod
    def of(cls, given: Namespace) -> Writing:
        """The settings in parsed arguments, checked before any work is done.

        Raises:
            UserError: The folder is not empty, or the size of shards is not a size.
        """
        size = str(given.max_shard_size).replace(" ", "").upper()
        if not re.fullmatch(r"0*[1-9]\d*[KMG]B", size):
            raise UserError(f"--max_shard_size is {given.max_shard_size!r}: give a size such as 500MB or {SHARD}.")
        return cls(
            new_folder(given.out), dtype_named(given.dtype) if given.dtype else None, size, device_named(given.device)
        )

    def edited(self, delta: Delta, base: str | None = None, with_delta: bool = False) -> None:
        """Writes the base model with a delta on it, its card, and the history of its edits.

        Args:
            delta: the delta.
            base: name of the base model; default: the one that the run used.
            with_delta: write the delta too, into a folder of its own inside, from which later removals start.

        Raises:
            EditLabError: The base model is not the one that was edited or cannot be loaded, or the folder cannot be
                written.
        """
        self._write(delta, base, delta.put_on, edited_card, with_delta)

    def unedited(self, delta: Delta, base: str | None = None) -> None:
        """Writes the base model itself, and its card.

        Raises:
            EditLabError: As for :meth:`edited`.
        """
        # A delta of zeros would turn a weight of -0.0 into 0.0.
        self._write(delta, base, None, reverted_card)

    def _edited(
        self, delta: Delta, base: str | None, change: Callable[..., None] | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model after a change, in the type to write, and its tokenizer."""
        model, tokenizer = delta.base(base)
        move(model, self.device)
        dtype = self.dtype or delta.dtype
        # Updates are added in the wider of the two types, and the sum is rounded once.
        cast(model, torch.promote_types(delta.dtype, dtype))
        if change is not None:
            change(model)
        cast(model, dtype)
        move(model, "cpu")  # where the writers copy each tensor anyway
        return model, tokenizer

    def _write(
        self,
        delta: Delta,
        base: str | None,
        change: Callable[..., None] | None,
        card: Callable[[Delta, str], str],
        with_delta: bool = False,
    ) -> None:
        # Computed now, because the working directory itself may be replaced by the folder.
        shown = shown_path(self.out)
        model, tokenizer = self._edited(delta, base, change)
        dtype = self.dtype or delta.dtype
        with atomic_folder(self.out) as folder:
            save(model, tokenizer, folder, self.max_shard_size)
            (folder / "README.md").write_text(card(delta, dtype_name(dtype)), encoding="utf-8")
            if change is not None:
                (folder / EDITS).write_text(delta.history.to_json() + "\n", encoding="utf-8")
            if with_delta:  # in a folder of its own: some programs load every safetensors file next to the weights
                (folder / PATCH).mkdir()
                fill_delta_folder(folder / PATCH, delta)
        log.info("%s: %s model, %s", shown, dtype_name(dtype), size_of(self.out))

    def gguf(self, delta: Delta, base: str | None = None) -> None:
        """Writes the base model with a delta on it as a GGUF file, and its card.

        Raises:
            EditLabError: As for :meth:`edited`; or the model or its tokenizer cannot be written as GGUF.
        """
        dtype = self.dtype or delta.dtype
        require_kind(dtype)
        shown = shown_path(self.out)
        source = gguf_source(base or delta.language_model)
        model, tokenizer = self._edited(delta, base, delta.put_on)
        origin = Origin(source, [f"{name}.weight" for name in delta.totals], delta.dtype)
        edits = [edit for edit in delta.history.edits if edit.fate == "kept"]
        about = f"{delta.language_model} with {counted(len(edits), 'fact edit', 'fact edits')} by editlab"
        prompts = [edit.prompt.replace("{}", edit.subject) for edit in edits[:_PROMPTS]]
        with atomic_folder(self.out) as folder:
            export_gguf(folder / GGUF, model, tokenizer, origin, about, prompts)
            text = gguf_card(delta, dtype_name(dtype), source is not None)
            (folder / "README.md").write_text(text, encoding="utf-8")
            (folder / EDITS).write_text(delta.history.to_json() + "\n", encoding="utf-8")
        log.info("%s: GGUF, read back and equal, %s", os.path.join(shown, GGUF), size_of(self.out))


def fill_delta_folder(folder: Path, delta: Delta) -> None:
    """Writes a delta and its card into a folder that exists."""
    card = folder / "README.md"
    card.write_text(delta_card(delta), encoding="utf-8")
    delta.save(folder / FILE)
    copy_permissions(folder / FILE, card)


def require_delta_type(dtype: str | None) -> None:
    """Check the setting ``--dtype`` of a verb that writes only a delta.

    Raises:
        UserError: It is another type than float32.
    """
    if dtype not in (None, "float32"):
        raise UserError(f"--dtype is {dtype}, and a delta is always float32: set --dtype in editlab apply.")


def new_folder(out: str, option: str = "--out") -> Path:
    """The absolute path of a folder that may be written.

    Args:
        out: its path.
        option: the option that names it, for messages.

    Raises:
        UserError: It is a file, or a folder that is not empty.
    """
    path = Path(out).expanduser().resolve()
    if path.is_file():
        raise UserError(f"{option} {out} is a file: give a new folder.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{option} {out} is not empty, and nothing is overwritten: give a new folder, or empty it first."
        )
    return path


def size_of(folder: Path) -> str:
    """The size of all files in a folder as text, such as ``12.3 MB``."""
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB"
