"""The command line: a LightningCLI with verbs of its own beside Lightning's, whose errors are one sentence each."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from io import TextIOWrapper
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar

from editlab import compat
from editlab.cli.commands import COMMANDS
from editlab.cli.failures import describe, is_saved, note_saved, surprise
from editlab.cli.messages import explain
from editlab.cli.recipe import SaveConfig, can_resume, complete
from editlab.data import EditDataModule
from editlab.distributed import ranks
from editlab.distributed.strategy import NAME, EditStrategy
from editlab.editor import SequentialEditor
from editlab.errors import EditLabError, UserError, causes
from editlab.runs.trainer import TRAINER_DEFAULTS
from editlab.utils.progress import bars, speaks

DESCRIPTION = (
    "Edits facts in a language model, one batch after another, and shows what it keeps and forgets. With --debug, an "
    "error comes with its traceback."
)

PLUGINS = "editlab.plugins"
"""Entry-point group of packages with callbacks, methods or formats, which YAML may then name by bare class name."""


def load_plugins() -> None:
    """Imports every registered plug-in, so that its classes can be named.

    Raises:
        UserError: where one can not be imported.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            raise UserError(
                f"The plug-in {plugin.name!r} ({plugin.value}) can not be imported ({error}): mend or uninstall it."
            ) from error


class EditLabCLI(compat.CommandHooks, LightningCLI):
    """``editlab fit | validate | test``, with editlab's model, data, logger and defaults."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's verbs that mean something here."""
        return {verb: skip for verb, skip in LightningCLI.subcommands().items() if verb != "predict"}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Lists the other verbs beside the Trainer's; :func:`run` takes them before they come here."""
        super().setup_parser(*args, **kwargs)
        verbs = compat.verbs_of(self.parser)
        for name, command in COMMANDS.items():
            verbs.add_subcommand(name, ArgumentParser(), help=command.help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets the default logger; YAML or a flag may replace it."""
        parser.set_defaults({"trainer.logger": {"class_path": "RunLogger", "init_args": {}}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the recipe.

        Raises:
            UserError: where its file is no text.
        """
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"The configuration is not in UTF-8 ({error.reason}): save its file as that.") from error

    def before_instantiate_classes(self) -> None:
        """Names the run's folder, finds the run to go on from, and sees to checkpoints."""
        complete(self.config[self.config.subcommand])

    def run_verb(self, verb: str, run: Callable[[], None]) -> None:
        """Run a verb of the Trainer, and note on an error of ``fit`` whether the run can be resumed."""
        with bars(self.config[verb].trainer.enable_progress_bar is not False):
            try:
                run()
            except BaseException as error:  # an interrupt too
                if verb == "fit" and can_resume(self.trainer):
                    note_saved(error)
                raise

    def instantiate_trainer(self, **arguments: Any) -> Trainer:
        """The Trainer.

        Raises:
            UserError: where its strategy does not know how to share an edit.
        """
        trainer = super().instantiate_trainer(**arguments)
        if isinstance(trainer.strategy, EditStrategy):
            return trainer
        if trainer.world_size > 1:
            raise UserError(
                f"{trainer.world_size} processes share edits by --trainer.strategy {NAME}: set it, or set "
                "--trainer.devices 1."
            )
        if isinstance(trainer.strategy, ParallelStrategy):
            raise UserError(
                f"trainer.strategy is a {type(trainer.strategy).__name__}, which averages gradients, and an edit has "
                f"none: leave it out for one device, or set {NAME}."
            )
        return trainer


def run(arguments: list[str] | None = None) -> None:
    """Runs a command; errors come out as they are.

    Args:
        arguments: as after ``editlab`` on the command line; the process's own where not given.
    """
    load_plugins()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]].run(arguments[1:])
    else:
        run_trainer(arguments)


def run_trainer(arguments: list[str]) -> EditLabCLI:
    """Runs one of the Trainer's verbs, ``fit``, ``validate`` or ``test``, and gives back the CLI."""
    return EditLabCLI(
        SequentialEditor,
        EditDataModule,
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        args=arguments,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"exit_on_error": False, "prog": "editlab", "description": DESCRIPTION},
    )


def main(arguments: list[str] | None = None) -> int:
    """The ``editlab`` command.

    With ``--debug`` among the arguments, errors come with their traceback.

    Returns:
        0; 2 where the user's input was at fault; 1 for any other failure; 130 where it was interrupted, and 143 where
        it was terminated; 141 where what it writes is no longer read.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    editing = not COMMANDS.keys() & set(arguments[:1])
    configure_messages()
    try:
        run([argument for argument in arguments if argument != "--debug"])
    except (KeyboardInterrupt, SystemExit) as error:
        after = "; the run goes on from its last finished batch with --ckpt_path last" if is_saved(error) else ""
        if isinstance(error, SIGTERMException):  # what the Trainer makes of SIGTERM; by itself it would end in 0
            return _say(f"Terminated{after}.", 128 + signal.SIGTERM)
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise  # --help; where it was interrupted, the Trainer stops with it what it was in the middle of
        return _say(f"Interrupted{after}.", 128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: no more is to be written, at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        if ranks.heard(error) and not speaks():
            return 0  # all ranks have got it: the first one says it, and its exit code counts
        return _say(*_told(error, editing))
    return 0


def _told(error: Exception, editing: bool) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    for link in causes(error):  # the parser wraps what a class says of its arguments
        if isinstance(link, EditLabError):
            return str(link), link.exit_code
    mistake = explain(error)
    if mistake is not None:
        return mistake, UserError.exit_code
    saved = is_saved(error)
    return describe(error, editing, saved) or str(surprise(error, editing, saved)), EditLabError.exit_code


def _say(sentence: str, code: int) -> int:
    sys.stderr.write(f"editlab: {sentence}\n")
    return code


class _Screen(logging.StreamHandler):
    """Writes to whatever standard output is at the time."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        """Takes no other stream."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A reader that has gone is an end, and no fault in the message.

        Raises:
            BrokenPipeError: for :func:`main` to end with.
        """
        if isinstance(error := sys.exc_info()[1], BrokenPipeError):
            raise error
        super().handleError(record)


def configure_messages() -> None:
    """Editlab's messages to the screen as plain lines; other libraries' chatter about our defaults held back."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a character of a fact
    handler = _Screen()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: speaks())
    for name in ("editlab", "callbacks"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
    for chatter in (
        ".*does not have many workers.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation within fit: that is meant
        r".*module\(s\) in eval mode at the start of training.*",  # the language model stays in eval mode
        ".*LeafSpec.*is deprecated.*",
        ".*sync_dist=True.*",  # what is logged is the same on every rank
        ".*is_gradient_checkpointing.*is deprecated.*",  # what PEFT asks transformers
        "LightningCLI's args parameter is intended.*",
        "Checkpoint directory .* exists and is not empty.*",  # a run that goes on writes over its own checkpoint
        "Using ModelCheckpoint with manual optimization.*",  # saved after the step is what is meant
    ):
        warnings.filterwarnings("ignore", message=chatter)
    if not speaks():
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        disable_progress_bar()
    logging.getLogger("lightning.pytorch").addFilter(lambda record: "Tip:" not in record.getMessage())
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


if __name__ == "__main__":
    sys.exit(main())
