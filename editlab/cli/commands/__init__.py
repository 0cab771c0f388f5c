"""The verbs of the command line: those that the Trainer runs, and those that need no Trainer, in one file each.

A verb's file is imported only when the verb runs, as most of them import torch. A new verb is a file with a
``COMMAND`` (:class:`editlab.cli.commands.command.Command`) and a line in :data:`VERBS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editlab.cli.commands.command import Command


DESCRIPTION = (
    "Edits facts in a language model, one batch after another, and measures which edits it retains. With --debug, an "
    "error is shown with its traceback."
)

TRAINER_VERBS = {
    "fit": "Edit the facts of a recipe, batch by batch, and evaluate the edited model.",
    "validate": "Evaluate all edits of a checkpoint again.",
    "test": "Evaluate facts that were not edited, on the model of a checkpoint.",
}
"""Verbs that the Trainer runs with a recipe -> their help."""


@dataclass(frozen=True)
class Verb:
    """A verb as ``editlab --help`` lists it."""

    name: str
    """the word after ``editlab``, and the name of its file, with _ for -"""
    help: str
    """its help, in one sentence"""
    needs_model: bool = True
    """whether it works with models or runs; a verb that does not is started without importing torch or a plug-in"""

    def load(self) -> Command:
        """Imports the verb's file and returns its command."""
        command: Command = import_module(f"{__name__}.{self.name.replace('-', '_')}").COMMAND
        return command


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("export", "Write the edited model of a checkpoint for transformers or for llama.cpp."),
        Verb("push", "Upload an exported model or delta to a repository on the hub."),
        Verb("apply", "Put patches on their base model, one after the other, and write the model."),
        Verb("revert", "Remove all edits, those after a batch, or single facts, and write the model."),
        Verb("log", "List what was edited, when, and what was kept, rolled back or removed."),
        Verb("ask", "Show the model's answers to prompts before and after its edits."),
        Verb("set", "Set a fact in a model: show what that changes, and write the edited model or a patch."),
        Verb("score", "Measure any model on facts as if it had been edited, with a column for its base."),
        Verb("evaluate", "Run tasks of lm-evaluation-harness on the edited model of a checkpoint."),
        Verb("compare", "Compare several runs in one table and one figure."),
        Verb("report", "Write one run as one HTML page, with the edits that the model does not hold."),
        Verb("view", "Serve a page to look at runs while they go."),
        Verb("facts", "Check files of facts.", needs_model=False),
        Verb("plan", "Choose settings for a number of edits, and say what to expect."),
        Verb("sweep", "Run an experiment of many runs and write its tables and figures."),
        Verb("ls", "List the recipes, presets and experiments that ship with editlab.", needs_model=False),
        Verb("cp", "Copy a recipe, preset or experiment that ships with editlab.", needs_model=False),
        Verb("validate-config", "Check a recipe as fit would, without loading a model or facts."),
        Verb("completion", "Write a script that completes the command in a shell."),
    )
}
"""The verbs without a Trainer by name, in the order in which ``editlab --help`` lists them."""

__all__ = ["DESCRIPTION", "TRAINER_VERBS", "VERBS", "Verb"]
