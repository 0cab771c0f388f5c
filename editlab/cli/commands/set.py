"""``editlab set``: sets one fact or several in a model, shows what that changes, and writes the model or a patch."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.api import EditResult
from editlab.api.changes import Changes
from editlab.api.setting import require_changes, set_facts
from editlab.cli.commands.command import Command
from editlab.cli.commands.export import write_delta
from editlab.cli.commands.writing import add_device_argument, new_folder, size_of
from editlab.cli.settings import EditSettings, edit_settings, split_words
from editlab.data import Fact
from editlab.data.files import facts_in
from editlab.data.formats import Subjects, read_all
from editlab.errors import UserError
from editlab.lm.loading.load import load
from editlab.lm.placement import device_named
from editlab.lm.precision import dtype_name
from editlab.lm.save import save
from editlab.runs.edit_log import EDITS
from editlab.runs.model_card import edited_card
from editlab.runs.summary import counted
from editlab.utils.files import atomic_folder, shown_path

log = logging.getLogger(__name__)

STDIN = "-"
"""Word in place of a fact that has facts read from standard input."""

DEFAULTS = {
    "model.evaluation.heldout_tokens": 4096,
    "model.evaluation.generated_texts": 0,
    "model.evaluation.generation": 0,
    "model.evaluation.bystanders": 128,
}
"""What is measured by default: less than by ``fit``, as a few facts change little."""


class _SetCommand(Command):
    """The verb, whose command line also takes a recipe and its settings."""

    def run(self, arguments: Sequence[str]) -> None:
        """Parses the arguments that follow the verb on the command line, and runs it."""
        own, recipe = split_words(arguments)
        _set(self.parser().parse_args(own), recipe)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "subject", nargs="?", type=str, help=f"What the fact is about; {STDIN} reads facts as JSON lines."
    )
    parser.add_argument("prompt", nargs="?", type=str, help="Text that the target completes, with {} for the subject.")
    parser.add_argument("target", nargs="?", type=str, help="What the model should say after the prompt.")
    parser.add_argument("--truth", type=str, help="What was right until now: its probability is shown as well.")
    parser.add_argument("--model", type=str, help="Name or path of the model. Default: the recipe's, or smollm2-135m.")
    parser.add_argument("--out", type=str, help="Folder to write the edited model to: a new or an empty one.")
    parser.add_argument("--delta", type=str, help="Folder to write only the updates to, for editlab ask and apply.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Show what would change, and write neither model nor patch."
    )
    parser.add_argument(
        "--config", "-c", type=str, help="Recipe whose method, layers, values and callbacks are used. Settings of "
        "its section model, and data.joint, data.subject, data.batch_size, trainer.callbacks, trainer.precision and "
        "seed_everything, can be given after it, as to editlab fit.",
    )  # fmt: skip
    add_device_argument(parser)


def _set(given: Namespace, recipe: list[str]) -> None:
    out = _output(given)
    if given.model is not None:
        recipe = [*recipe, f"--model.language_model={given.model}"]
    settings = edit_settings(recipe, DEFAULTS, "set")
    facts = _facts(given, settings.arguments.pop("subject"))
    require_changes(facts)
    device = device_named(given.device)
    name = settings.language_model
    model, tokenizer = load(name, settings.dtype)
    model.to(device)  # type: ignore[arg-type]
    with _lightning_quiet():
        result = set_facts(
            name, model, tokenizer, facts, settings.layers, {**settings.arguments, "callbacks": settings.callbacks}
        )
    changes = result.changes()
    lines = [_headline(result, changes, settings, dry=given["dry_run"]), "", changes.to_text(), ""]
    lines += _write(given, out, result, model, tokenizer) if not given["dry_run"] else [_NOT_WRITTEN]
    log.info("\n%s\n", "\n".join(lines))


_NOT_WRITTEN = "Nothing was written (--dry-run): with --delta FOLDER or --out FOLDER in its place, this is kept."


def _output(given: Namespace) -> Path | None:
    """Return the folder to write, checked before any work is done; None if none is given for a dry run."""
    if given.out is not None and given.delta is not None:
        raise UserError(
            "--out and --delta are both given: choose --out for the whole model, or --delta for a patch, of which "
            "editlab apply makes the model."
        )
    if given.out is None and given.delta is None and not given["dry_run"]:
        raise UserError(
            "Nothing says where the result goes: give --delta FOLDER for a patch of a few MB, --out FOLDER for the "
            "whole edited model, or --dry-run to see what would change."
        )
    if given.delta is not None:
        return new_folder(given.delta, "--delta")
    return None if given.out is None else new_folder(given.out)


def _facts(given: Namespace, rule: str) -> list[Fact]:
    """Return the fact on the command line, or those on standard input."""
    if given.subject == STDIN and given.prompt is None:
        if given.truth is not None:
            raise UserError('--truth belongs to a fact on the command line: give each line its own "truth".')
        return facts_in(_typed(), "standard input", rule)
    words = {name: given[name] for name in ("subject", "prompt", "target")}
    missing = [name for name, word in words.items() if word is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give SUBJECT PROMPT TARGET, such "
            'as "The Eiffel Tower" "{} is located in the city of" Rome, or - to read JSON lines.'
        )
    record = words if given.truth is None else {**words, "truth": given.truth}
    subjects = Subjects(rule)
    try:
        return read_all(subjects.record(record), 0, subjects=subjects)
    except UserError as error:
        raise UserError(f"The fact {error}.") from None


def _typed() -> str:
    if sys.stdin.isatty():
        sys.stderr.write(
            'Type one fact on each line, as {"subject": ..., "prompt": ..., "target": ...}; end with Ctrl-D.\n'
        )
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"Standard input is not in {error.encoding.upper()} ({error.reason}): convert the facts."
        ) from error


def _headline(result: EditResult, changes: Changes, settings: EditSettings, dry: bool) -> str:
    layers = ", ".join(map(str, result.editor.layer_numbers))
    method = type(result.editor.method).__name__
    count = counted(len(result.facts), "fact", "facts")
    lines = [
        f"{count} {'would be set' if dry else 'set'} in {settings.language_model} by {method} in layers {layers}; "
        f"the model {'would say' if dry else 'now says'} {changes.held} of {len(result.facts)} targets"
    ]
    if changes.held < len(result.facts):
        lines.append("for the others, a larger --model.values.clamp allows a larger edit")
    if result.rolled_back:
        lines.append(f"rolled back by a callback: {', '.join(repr(fact.question) for fact in result.rolled_back)}")
    return "\n".join(lines)


def _write(
    given: Namespace, out: Path | None, result: EditResult, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Write the model or the delta, and return lines that say where it is and how it is used."""
    assert out is not None  # _output has refused a command without a folder
    shown, question = shlex.quote(shown_path(out)), shlex.quote(result.facts[0].question)
    delta = result.delta()
    if given.delta is not None:
        write_delta(delta, out)
        base = shlex.quote(delta.language_model)
        return [
            f"ask it    editlab ask --delta {shown} {question}",
            f"apply it  editlab apply --delta {shown} --model {base} --out edited",
        ]
    with atomic_folder(out) as folder:
        save(model, tokenizer, folder)
        (folder / "README.md").write_text(edited_card(delta, dtype_name(model.dtype)), encoding="utf-8")
        (folder / EDITS).write_text(delta.history.to_json() + "\n", encoding="utf-8")
    return [
        f"{shown}: {dtype_name(model.dtype)} model, {size_of(out)}",
        f"ask it    editlab ask --model {shown} {question}",
    ]


@contextmanager
def _lightning_quiet() -> Iterator[None]:
    """Keeps back Lightning's messages about devices and epochs inside the ``with``: the edit is no run."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


COMMAND = _SetCommand(
    "set", "Set a fact in a model: show what that changes, and write the edited model or a patch.", _add_arguments
)
