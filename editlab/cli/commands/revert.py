"""``editlab revert``: removes all edits, or those after a batch, and writes the model."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import Writing, add_checkpoint_arguments, add_writing_arguments
from editlab.runs.checkpoint import earlier_checkpoint, find_checkpoint
from editlab.runs.delta import Delta


def _add_arguments(parser: ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    add_writing_arguments(parser)
    parser.add_argument(
        "--to_step",
        type=int,
        default=0,
        help="Keep the first N batches; the run must have kept its checkpoint after them (EditCheckpoint's keep_all).",
    )


def _revert(given: Namespace) -> None:
    writing = Writing.of(given)
    checkpoint = find_checkpoint(given.ckpt_path)
    if given.to_step == 0:
        writing.unedited(Delta.from_checkpoint(checkpoint, usable=False), given.model)
    else:
        writing.edited(Delta.from_checkpoint(earlier_checkpoint(checkpoint, given.to_step)), given.model)


COMMAND = Command("revert", "Remove all edits, or those after a batch, and write the model.", _add_arguments, _revert)
