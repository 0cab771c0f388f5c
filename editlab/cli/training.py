"""The verbs ``fit``, ``validate`` and ``test``: a LightningCLI with editlab's model, data, logger and defaults."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ParallelStrategy
from transformers.utils.logging import disable_progress_bar

from editlab.cli.commands import DESCRIPTION, TRAINER_VERBS
from editlab.cli.failures import note_saved
from editlab.cli.help import ALL, arrange, help_wanted
from editlab.cli.recipe import SaveConfig, can_resume, complete
from editlab.data import EditDataModule
from editlab.distributed.strategy import NAME, EditStrategy
from editlab.editor import SequentialEditor
from editlab.errors import UserError
from editlab.runs.progress_bar import with_progress_bar
from editlab.runs.trainer import TRAINER_DEFAULTS
from editlab.runs.workplace import abandon_folder
from editlab.solver.base import EditMethod
from editlab.utils import compat
from editlab.utils.files import require_end
from editlab.utils.progress import bars, speaks


class EditLabCLI(compat.CommandHooks, LightningCLI):
    """``editlab fit | validate | test``, with editlab's model, data, logger and defaults."""

    full_help = False
    """whether ``--help`` shows every setting"""
    verbs: Collection[str] = TRAINER_VERBS
    """the verbs that have a parser"""

    def arrange_help(self, verb: str, parser: Any, arguments: list[Any]) -> None:
        """Puts editlab's texts in place of Lightning's, and leaves most of the Trainer's settings out."""
        arrange(verb, parser, arguments, self.full_help)

    @classmethod
    def for_verb(cls, verb: str) -> type[EditLabCLI]:
        """Return this class with the parser of one verb; making those of the others takes a quarter of a second."""

        class ForVerb(cls):  # type: ignore[valid-type, misc]
            verbs = (verb,)

        return ForVerb

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """The Trainer's verbs that have a parser, with the arguments that they do not take from the command line."""
        return {verb: skip for verb, skip in LightningCLI.subcommands().items() if verb in cls.verbs}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets the default logger, which YAML or a flag may replace."""
        parser.set_defaults({"trainer.logger": {"class_path": "RunLogger", "init_args": {}}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the recipe.

        Raises:
            UserError: The file is not text in UTF-8, or no regular file.
        """
        words = [str(word) for word in args or ()]
        for index, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name in ("--config", "-c"):
                path = value if equals else "".join(words[index + 1 : index + 2])
                require_end(Path(path), f"The configuration {path}")
        try:
            with compat.arguments_of_one_class(EditMethod):
                super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"The configuration is not in UTF-8 ({error.reason}): save the file in UTF-8.") from error

    def before_instantiate_classes(self) -> None:
        """Names the run's folder, finds the run to resume, and adds the callback that writes checkpoints."""
        complete(self.config[self.config.subcommand])

    def run_verb(self, verb: str, run: Callable[[], None]) -> None:
        """Runs a verb of the Trainer; an error of ``fit`` is marked if the run can be resumed."""
        with bars(self.config[verb].trainer.enable_progress_bar is not False):
            try:
                run()
            except BaseException as error:  # includes interrupts
                if verb == "fit" and can_resume(self.trainer):
                    note_saved(error)
                abandon_folder(self.trainer)
                raise

    def instantiate_trainer(self, **arguments: Any) -> Trainer:
        """Creates the Trainer.

        Raises:
            UserError: Its strategy cannot divide an edit among several processes.
        """
        settings = self.config_init[self.config.subcommand].trainer
        given = settings.callbacks or []
        settings.callbacks = with_progress_bar(
            given if isinstance(given, list) else [given], settings.enable_progress_bar is not False
        )
        trainer = super().instantiate_trainer(**arguments)
        if isinstance(trainer.strategy, EditStrategy):
            return trainer
        if trainer.world_size > 1:
            raise UserError(
                f"{trainer.world_size} processes can share edits only with --trainer.strategy {NAME}: set it, or set "
                "--trainer.devices 1."
            )
        if isinstance(trainer.strategy, ParallelStrategy):
            raise UserError(
                f"trainer.strategy is a {type(trainer.strategy).__name__}, which averages gradients, and an edit has "
                f"none: leave it out for one device, or set {NAME}."
            )
        return trainer


def run_trainer(arguments: list[str]) -> EditLabCLI:
    """Runs one of the Trainer's verbs (``fit``, ``validate``, ``test``) and returns the CLI."""
    arguments, wanted = help_wanted(arguments)
    if wanted:
        compat.read_attribute_docstrings()  # parsing the sources for them takes a second
    # Without a request for the short help nothing is left out: config.yaml lacks the settings that the help lacks.
    cls: type[EditLabCLI] = _WithFullHelp if wanted in (ALL, None) else EditLabCLI
    return _create(cls.for_verb(arguments[0]) if arguments[:1] and arguments[0] in TRAINER_VERBS else cls, arguments)


def _create(cls: type[EditLabCLI], arguments: list[str]) -> EditLabCLI:
    return cls(
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


class _WithFullHelp(EditLabCLI):
    full_help = True


class _NotRun(_WithFullHelp):
    """The command line of ``fit`` without the run: model, data and Trainer are made, and nothing is written."""

    verbs = ("fit",)

    def before_instantiate_classes(self) -> None:
        pass

    def run_verb(self, verb: str, run: Callable[[], None]) -> None:
        pass


def built_fit(arguments: list[str]) -> EditLabCLI:
    """The CLI of ``fit`` with the model, the data and the Trainer of a recipe, for a verb that plans a run.

    Args:
        arguments: as those of ``editlab fit``.
    """
    return _create(_NotRun, ["fit", *arguments])


class _ParsersAlone(_WithFullHelp):
    """The command line without a run: it stops where the arguments would be parsed."""

    class Stop(Exception):  # noqa: N818 - not an error
        """Carries the parsers of the verbs."""

    def arrange_help(self, verb: str, parser: Any, arguments: list[Any]) -> None:
        super().arrange_help(verb, parser, arguments)
        self.found = {**getattr(self, "found", {}), verb: parser}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise self.Stop(self.found)


def trainer_parsers() -> dict[str, LightningArgumentParser]:
    """The parsers of the Trainer's verbs by name, for shell completion."""
    compat.read_attribute_docstrings()
    try:
        _create(_ParsersAlone, [])
    except _ParsersAlone.Stop as stop:
        found: dict[str, LightningArgumentParser] = stop.args[0]
        return found
    finally:
        compat.read_attribute_docstrings(False)  # shells complete the settings of every callback; reading takes long
    raise AssertionError("the parsers stop before they parse")


def configure_libraries() -> None:
    """Silences warnings and tips of other libraries that are about editlab's own defaults, and other ranks' messages.

    It must be called after the imports, because Lightning sets the level of its messages when it is imported.
    """
    for message in (
        ".*does not have many workers.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation within fit, on purpose
        r".*module\(s\) in eval mode at the start of training.*",  # the language model stays in eval mode
        ".*LeafSpec.*is deprecated.*",
        ".*sync_dist=True.*",  # what is logged is the same on every rank
        ".*is_gradient_checkpointing.*is deprecated.*",  # PEFT's call of transformers
        "LightningCLI's args parameter is intended.*",
        "Checkpoint directory .* exists and is not empty.*",  # a resumed run overwrites its own checkpoint
        "Using ModelCheckpoint with manual optimization.*",  # saving after the step is what is wanted
    ):
        warnings.filterwarnings("ignore", message=message)
    compat.hide_writer_threads()
    if not speaks():
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning says something that the user does not know: not that one pass has ended."""
    return not any(
        phrase in record.getMessage() for phrase in ("Tip:", "`max_epochs=1` reached", "TPU available: False")
    )
