"""The verbs that need no Trainer, one file each."""

from __future__ import annotations

from editlab.cli.commands import apply, ask, compare, export, facts, report, revert, sweep
from editlab.cli.commands.command import Command

COMMANDS: dict[str, Command] = {
    verb.COMMAND.name: verb.COMMAND for verb in (export, apply, revert, ask, compare, report, facts, sweep)
}
"""By the word after ``editlab``, in the order in which ``--help`` lists them."""

__all__ = ["COMMANDS", "Command"]
