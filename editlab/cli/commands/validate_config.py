"""``editlab validate-config``: checks a recipe as ``fit`` would, without loading a model or facts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "editlab validate-config FILE [FILE ...] [--SECTION.NAME VALUE ...]"
    parser.add_argument(
        "files", type=str, nargs="+", metavar="FILE",
        help="YAML file, or the name of a recipe or preset that ships. Of several, and of the settings after them, the "
        "last one counts, as in fit.",
    )  # fmt: skip


def _validate(files: Sequence[str], overrides: Sequence[str]) -> None:
    # By name, as verbs themselves are loaded: it needs the list of verbs, of which this is one.
    log.info("valid: %s", import_module("editlab.cli.validation").validate(files, overrides))


@dataclass(frozen=True)
class _WithSettings(Command):
    """A command whose files may be followed by any settings of ``fit``, which ``fit``'s parser reads."""

    def run(self, arguments: Sequence[str]) -> None:
        """Parses the arguments and runs the verb; raises what ``fit`` would raise about the recipe."""
        first = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        files, overrides = list(arguments[:first]), list(arguments[first:])
        given: Namespace = self.parser().parse_args(files + (["--help"] if {"-h", "--help"} & set(overrides) else []))
        _validate(given.files, overrides)


COMMAND = _WithSettings(
    "validate-config", "Check a recipe as fit would, without loading a model or facts.", _add_arguments
)
