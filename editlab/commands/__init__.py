"""The verbs that need no Trainer, one file each."""

from __future__ import annotations

from editlab.commands import apply, ask, export, facts, revert
from editlab.commands.command import Command

COMMANDS: dict[str, Command] = {
    command.name: command for command in (export.COMMAND, apply.COMMAND, revert.COMMAND, ask.COMMAND, facts.COMMAND)
}
"""By the word after ``editlab``, in the order in which ``--help`` lists them."""

__all__ = ["COMMANDS", "Command"]
