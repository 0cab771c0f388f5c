"""The class of a verb: its name, its arguments, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jsonargparse import ArgumentParser, Namespace


def _nothing(parser: ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Command:
    """One verb of the command line, or a group of them."""

    name: str
    help: str
    """its help, in one sentence"""
    add_arguments: Callable[[ArgumentParser], None] = _nothing
    carry_out: Callable[[Namespace], None] | None = None
    """function that runs the verb with its parsed arguments; None for a group"""
    commands: tuple[Command, ...] = field(default=())
    """the verbs of a group"""

    def parser(self, prefix: str = "editlab") -> ArgumentParser:
        """The parser of its arguments, which raises an error and does not exit if they are wrong."""
        name = f"{prefix} {self.name}"
        parser = ArgumentParser(prog=name, description=self.help, exit_on_error=False)
        self.add_arguments(parser)
        if self.commands:
            verbs = parser.add_subcommands()
            for command in self.commands:
                verbs.add_subcommand(command.name, command.parser(name), help=command.help)
        return parser

    def run(self, arguments: Sequence[str]) -> None:
        """Parses the arguments that follow the verb on the command line, and runs it.

        Raises:
            ArgumentError: The arguments are wrong.
            EditLabError: The verb fails.
        """
        command, given = self, self.parser().parse_args(list(arguments))
        while command.carry_out is None:
            command = next(verb for verb in command.commands if verb.name == given.subcommand)
            given = given[command.name]
        command.carry_out(given)
