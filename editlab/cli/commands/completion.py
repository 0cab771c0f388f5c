"""``editlab completion``: writes a script by which a shell completes verbs, settings and their values."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.errors import UserError

SHELLS = ("bash", "zsh")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="Shell for which the script is written.")


def _complete(given: Namespace) -> None:
    sys.stdout.write(script(given.shell))


def script(shell: str) -> str:
    """The completion script of all verbs for a shell.

    Raises:
        UserError: The package that makes the script is not installed.
    """
    if find_spec("shtab") is None:
        raise UserError("Shell completion needs the package shtab: pip install 'editlab[completion]'.")
    import shtab

    parser = whole_parser()
    if hasattr(parser, "get_completion_script"):  # completes values, too; older versions lack it
        return str(parser.get_completion_script(f"shtab-{shell}"))
    return str(shtab.complete(parser, shell))


def whole_parser() -> ArgumentParser:
    """A parser that has all verbs with their arguments; it is not meant to parse."""
    # By name, as verbs themselves are loaded: both of these modules need the list of verbs, of which this is one.
    commands, training = import_module("editlab.cli.commands"), import_module("editlab.cli.training")
    parser = ArgumentParser(prog="editlab", exit_on_error=False)
    verbs = parser.add_subcommands()
    for name, verb_parser in training.trainer_parsers().items():
        verbs.add_subcommand(name, verb_parser, help=commands.TRAINER_VERBS[name])
    for verb in commands.VERBS.values():
        _add(verbs, verb.load())
    return parser


def _add(verbs: object, command: Command) -> None:
    """Adds a command to the verbs of a parser, and its own verbs below it; jsonargparse wants that order."""
    parser = ArgumentParser(description=command.help, exit_on_error=False)
    command.add_arguments(parser)
    verbs.add_subcommand(command.name, parser, help=command.help)  # type: ignore[attr-defined]
    if command.commands:
        below = parser.add_subcommands()
        for inner in command.commands:
            _add(below, inner)


COMMAND = Command("completion", "Write a script that completes the command in a shell.", _add_arguments, _complete)
