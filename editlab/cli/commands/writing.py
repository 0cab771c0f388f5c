"""What export, apply and revert share: the arguments that say where and how, and the writing itself."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from editlab.errors import UserError
from editlab.lm.placement import device_named
from editlab.lm.precision import WEIGHTS, dtype_name, dtype_named
from editlab.lm.save import SHARD, cast, save
from editlab.runs.delta import Delta
from editlab.runs.model_card import edited_card, reverted_card
from editlab.utils.files import atomic_folder

log = logging.getLogger(__name__)


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Those that name an edited model."""
    parser.add_argument(
        "--ckpt_path", required=True, help="A checkpoint, or a run's folder for its checkpoints/last.ckpt."
    )
    parser.add_argument("--model", help="Where the base model is, if no longer where the run found it: a name or path.")


def add_device_argument(parser: ArgumentParser) -> None:
    """The device that the model is on."""
    parser.add_argument("--device", default="cpu", help="Where the model runs: cpu, cuda, cuda:1 or mps.")


def add_writing_arguments(parser: ArgumentParser) -> None:
    """Those that say where and how a model is written."""
    add_out_argument(parser)
    parser.add_argument("--dtype", choices=WEIGHTS, help="Type of the weights; that of the run where not given.")
    add_device_argument(parser)
    parser.add_argument("--max_shard_size", default=SHARD, help="Size above which the weights go to several files.")


def add_out_argument(parser: ArgumentParser) -> None:
    """The folder to write."""
    parser.add_argument("--out", required=True, help="The folder to write: a new or an empty one.")


@dataclass(frozen=True)
class Writing:
    """Where and how a model is written."""

    out: Path
    dtype: torch.dtype | None
    """None for the run's"""
    max_shard_size: str
    device: torch.device
    """where the sum of weights and updates is taken"""

    @classmethod
    def of(cls, given: Namespace) -> Writing:
        """Of parsed arguments; checked before any work is done.

        Raises:
            UserError: The folder holds something, or the size is none.
        """
        size = str(given.max_shard_size).replace(" ", "").upper()
        if not re.fullmatch(r"0*[1-9]\d*[KMG]B", size):
            raise UserError(f"--max_shard_size is {given.max_shard_size!r}: give a size such as 500MB or {SHARD}.")
        return cls(
            new_folder(given.out), dtype_named(given.dtype) if given.dtype else None, size, device_named(given.device)
        )

    def edited(self, delta: Delta, base: str | None = None) -> None:
        """Writes the base model with a delta on it, and its card.

        Raises:
            EditLabError: The base model is another or can not be loaded, or the folder not be written.
        """
        self._write(delta, base, delta.put_on, edited_card)

    def unedited(self, delta: Delta, base: str | None = None) -> None:
        """Writes the base model itself, and its card.

        Raises:
            EditLabError: As :meth:`edited`.
        """
        # Not with a delta of zeros: that would turn a weight of -0.0 into 0.0.
        self._write(delta, base, lambda model: None, reverted_card)

    def _write(
        self, delta: Delta, base: str | None, change: Callable[..., None], card: Callable[[Delta, str], str]
    ) -> None:
        shown = os.path.relpath(self.out)  # while there is a working directory: it may be the folder to be written
        model, tokenizer = delta.base(base)
        model.to(self.device)  # type: ignore[arg-type]
        dtype = self.dtype or delta.dtype
        # The sum is taken in the wider of the two types, and rounded once.
        cast(model, torch.promote_types(delta.dtype, dtype))
        change(model)
        cast(model, dtype)
        with atomic_folder(self.out) as folder:
            save(model, tokenizer, folder, self.max_shard_size)
            (folder / "README.md").write_text(card(delta, dtype_name(dtype)), encoding="utf-8")
        log.info("%s: %s model, %s", shown, dtype_name(dtype), size_of(self.out))


def new_folder(out: str) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
        UserError: It holds something, or is a file.
    """
    path = Path(out).expanduser().resolve()
    if path.is_file():
        raise UserError(f"--out {out} is a file: give a new folder.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {out} is not empty, and nothing is overwritten: give a new folder, or empty it first.")
    return path


def size_of(folder: Path) -> str:
    """The size of all files in a folder, in words."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"
