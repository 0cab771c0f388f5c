"""``editlab export``: writes the edited model for transformers or for llama.cpp, or only the sums of its updates."""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import (
    Writing,
    add_checkpoint_arguments,
    add_writing_arguments,
    fill_delta_folder,
    require_delta_type,
    size_of,
)
from editlab.errors import UserError
from editlab.lm.save import SHARD
from editlab.runs.delta import FILE, Delta
from editlab.runs.patched_model import read_patch
from editlab.utils.files import atomic_folder, shown_path

log = logging.getLogger(__name__)

FORMATS = ("folder", "gguf")
"""Ways to write the model."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_checkpoint_arguments(parser, ", or a patch")
    add_writing_arguments(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="folder",
        help="folder: for transformers; gguf: one file for llama.cpp, read back and compared before it is kept.",
    )
    parser.add_argument("--delta-only", action="store_true", help=f"Write only {FILE}, the sums of updates in float32.")


def _export(given: Namespace) -> None:
    writing = Writing.of(given)
    if given.format == "gguf" and (given.delta_only or given.max_shard_size != SHARD):
        extra = "--delta-only" if given.delta_only else "--max_shard_size"
        raise UserError(f"--format gguf writes the whole model as one file: leave {extra} out.")
    delta = read_patch(given.ckpt_path)
    if given.format == "gguf":
        writing.gguf(delta, given.model)
    elif not given.delta_only:
        writing.edited(delta, given.model)
    else:
        require_delta_type(given.dtype)
        write_delta(delta, writing.out)


def write_delta(delta: Delta, out: Path) -> None:
    """Writes the delta and its card into a new folder; the base model is not needed.

    Raises:
        EditLabError: The folder cannot be written.
    """
    shown = shown_path(out)  # computed now: the working directory itself may be replaced by the folder
    with atomic_folder(out) as folder:
        fill_delta_folder(folder, delta)
    log.info("%s: delta of %s, %s", shown, delta.language_model, size_of(out))


COMMAND = Command(
    "export", "Write the edited model of a checkpoint for transformers or for llama.cpp.", _add_arguments, _export
)
