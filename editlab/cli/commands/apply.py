"""``editlab apply``: puts a delta on its base model and writes the edited model as a folder for transformers."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.writing import Writing, add_writing_arguments
from editlab.runs.delta import Delta


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--delta", required=True, help="Delta that export --delta-only wrote: its file or folder.")
    parser.add_argument("--model", required=True, help="Name or path of the base model.")
    add_writing_arguments(parser)


def _apply(given: Namespace) -> None:
    writing = Writing.of(given)
    writing.edited(Delta.load(Path(given.delta).expanduser()), given.model)


COMMAND = Command("apply", "Put a delta on its base model and write the edited model.", _add_arguments, _apply)
