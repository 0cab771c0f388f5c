"""The ``editlab`` command, which runs a verb and turns every error into one sentence and an exit code.

The imports at the top of this module do not import torch, Lightning or transformers, which takes seconds: ``--help``,
``--version`` and ``facts check`` do not need them, and OpenMP has to be configured before torch is imported.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import signal
import sys
import traceback
from importlib.metadata import entry_points
from io import TextIOWrapper
from typing import Any

from tqdm import tqdm

from editlab import __version__
from editlab.cli.commands import DESCRIPTION, TRAINER_VERBS, VERBS
from editlab.errors import EditLabError, UserError, causes
from editlab.utils.machine import LoadMeter, choose_threads, wait_passively_if_busy
from editlab.utils.progress import speaks

PLUGINS = "editlab.plugins"
"""Entry-point group of packages with callbacks, methods or formats, which YAML may then name by bare class name."""


def load_plugins() -> None:
    """Imports every registered plug-in, so that its classes can be named in recipes.

    Raises:
        UserError: A plug-in cannot be imported.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            raise UserError(
                f"The plug-in {plugin.name!r} ({plugin.value}) cannot be imported ({error}): repair or uninstall it."
            ) from error


def run(arguments: list[str] | None = None) -> None:
    """Runs a command without catching its errors.

    Args:
        arguments: the words after ``editlab`` on the command line; default: this process's own arguments.

    Raises:
        UserError: There is no such verb.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "--help=all"):
        help_parser().parse_args(["--help"])
    if first == "--version":
        log_line(f"editlab {__version__}")
        return
    _require_verb(first)
    verb = VERBS.get(first)
    if verb is not None:  # their help shows everything anyway
        arguments = ["--help" if argument == "--help=all" else argument for argument in arguments]
    if verb is not None and not verb.needs_model:
        verb.load().run(arguments[1:])
        return
    meter = LoadMeter()
    if "torch" not in sys.modules:  # where it is imported, OpenMP has read its settings already
        wait_passively_if_busy(meter)
    load_plugins()
    from editlab.cli import training

    training.configure_libraries()
    choose_threads(meter)
    if verb is not None:
        verb.load().run(arguments[1:])
    else:
        training.run_trainer(arguments)


def help_parser() -> argparse.ArgumentParser:
    """A parser for ``editlab --help`` alone: it lists the verbs and parses none of their arguments."""
    parser = argparse.ArgumentParser(prog="editlab", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="Show the version and exit.")
    verbs = parser.add_subparsers(
        title="verbs", metavar="{" + ",".join(_verbs()) + "}", description="Each has a --help of its own."
    )
    for name, sentence in _verbs().items():
        verbs.add_parser(name, help=sentence)
    return parser


def _verbs() -> dict[str, str]:
    return TRAINER_VERBS | {name: verb.help for name, verb in VERBS.items()}


def _require_verb(word: str) -> None:
    """Refuses a first argument that is neither a verb nor an option.

    Raises:
        UserError: The argument is not a verb; the message suggests the closest verb, or lists all of them.
    """
    verbs = _verbs()
    if not word:
        raise UserError("A verb is missing: --help lists them.")
    if word not in verbs and not word.startswith("-"):
        close = difflib.get_close_matches(word, list(verbs), n=1)
        *some, last = verbs
        advice = f"did you mean {close[0]}?" if close else f"use {', '.join(some)} or {last}."
        raise UserError(f"There is no verb {word!r}: {advice}")


def main(arguments: list[str] | None = None) -> int:
    """The ``editlab`` command.

    With ``--debug`` among the arguments, errors are shown with their traceback.

    Returns:
        0 for success; 2 for a mistake in the user's input; 1 for any other failure; 130 if it was interrupted, 143 if
        it was terminated; 141 if the program that read its output has ended.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    editing = not VERBS.keys() & set(arguments[:1])
    configure_messages()
    try:
        _require_working_directory()
        run([argument for argument in arguments if argument != "--debug"])
    except (KeyboardInterrupt, SystemExit) as error:
        # --help raises SystemExit; Lightning also turns the user's interrupt of a run into one.
        if type(error) is SystemExit and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return _stopped(error)
    except BrokenPipeError:  # the reader has ended, as with `| head`: nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not speaks() and _is_known_to_all_ranks(error):
            return 0  # rank 0 reports it, and its exit code counts
        return _print_error(*_explained(error, editing))
    return 0


def _require_working_directory() -> None:
    """Refuse a working directory that was removed, which libraries report as a missing file without a name.

    Raises:
        UserError: It was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("The working directory was removed: change to a folder that exists.") from error


def _stopped(error: BaseException) -> int:
    """Reports an interrupt or a termination, and returns the exit code."""
    lightning: Any = sys.modules.get("lightning.pytorch.utilities.exceptions")
    after, terminated = "", False
    if lightning is not None:  # otherwise no run has begun
        from editlab.cli.failures import is_saved

        after = "; --ckpt_path last resumes the run after its last finished batch" if is_saved(error) else ""
        # Lightning turns SIGTERM into this exception, which alone would lead to exit code 0.
        terminated = isinstance(error, lightning.SIGTERMException)
    if terminated:
        return _print_error(f"Terminated{after}.", 128 + signal.SIGTERM)
    return _print_error(f"Interrupted{after}.", 128 + signal.SIGINT)


def _is_known_to_all_ranks(error: Exception) -> bool:
    from editlab.distributed import ranks

    return ranks.reached_all(error)


def _explained(error: Exception, editing: bool) -> tuple[str, int]:
    """A sentence for an error, and the exit code."""
    for link in causes(error):  # the parser wraps errors that a class raises about its arguments
        if isinstance(link, EditLabError):
            return str(link), link.exit_code
    from editlab.cli.failures import describe, is_saved, unexpected
    from editlab.cli.messages import explain

    mistake = explain(error)
    if mistake is not None:
        return mistake, UserError.exit_code
    saved = is_saved(error)
    return describe(error, editing, saved) or str(unexpected(error, editing, saved)), EditLabError.exit_code


def _print_error(sentence: str, code: int) -> int:
    sys.stderr.write(f"editlab: {sentence}\n")
    return code


def log_line(line: str) -> None:
    """Writes one line to the screen, as a message of editlab."""
    logging.getLogger("editlab").info("%s", line)


class _Screen(logging.StreamHandler):
    """A handler that writes to the standard output of the moment, which a test or a program may replace."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        """Ignores the stream: it is always the standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message above the progress bars that are on the screen."""
        with tqdm.external_write_mode(file=sys.stdout):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ends the command if the program that reads its output has ended.

        Raises:
            BrokenPipeError: The reader has ended; :func:`main` turns this into an exit code.
        """
        if isinstance(error := sys.exc_info()[1], BrokenPipeError):
            raise error
        super().handleError(record)


def configure_messages() -> None:
    """Sends editlab's messages to the screen as plain lines."""
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


if __name__ == "__main__":
    sys.exit(main())
