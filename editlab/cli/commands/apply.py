"""``editlab apply``: puts patches on their base model, one after the other, and writes the edited model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.export import write_delta
from editlab.cli.commands.writing import Writing, add_writing_arguments, require_delta_type
from editlab.errors import UserError
from editlab.runs.delta import Delta
from editlab.runs.patched_model import Answers, PatchedModel, read_patch
from editlab.runs.stack import Stack, contradictions, require_one_base, stack
from editlab.runs.tables import Table, three_decimals

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "patches",
        nargs="*",
        type=str,
        default=[],
        help="Deltas, in their order: each a file or folder of export --delta-only, or a run's folder.",
    )
    parser.add_argument("--delta", help="The same as one patch.")
    parser.add_argument("--model", required=True, help="Name or path of the base model.")
    add_writing_arguments(parser)
    parser.add_argument(
        "--last-wins",
        action="store_true",
        help="If patches give one prompt different targets, take the fact out of the earlier one first.",
    )
    parser.add_argument("--delta-only", action="store_true", help="Write only the delta of all patches together.")


def _apply(given: Namespace) -> None:
    writing = Writing.of(given)
    names = [*given.patches, *([] if given.delta is None else [given.delta])]
    if not names:
        raise UserError("apply needs a patch: give a delta that export --delta-only wrote, or a run's folder.")
    deltas = [_read(name) for name in names]
    if len(deltas) == 1 and not given.delta_only:
        writing.edited(deltas[0], given.model)  # as export does: the delta is at hand already
        return
    if given.delta_only:
        require_delta_type(given.dtype)
    require_one_base(deltas, names)  # before a model is loaded, which takes longer
    contradictions(deltas, names, given.last_wins)
    found = stack(PatchedModel(deltas[0], given.model, writing.device), deltas, names, given.last_wins)
    log.info("\n%s\n", render(found, names))
    if given.delta_only:
        write_delta(found.delta, writing.out)
    else:
        writing.edited(found.delta, given.model, with_delta=True)


def _read(name: str) -> Delta:
    """A patch; what is neither a run nor a folder of one is read as a delta's file, whatever its name."""
    path = Path(name).expanduser()
    return Delta.load(path) if not path.is_dir() and path.suffix != ".ckpt" else read_patch(name)


def render(found: Stack, names: Sequence[str]) -> str:
    """A row for each patch but the first: how far it reaches into what lies below it, and what its facts lose."""
    rows = [
        [name, three_decimals(one.overlap), three_decimals(one.largest), _change(one.below_before, one.below_after),
         _change(one.own_alone, one.own)]
        for name, one in zip(names[1:], found.interference, strict=True)
    ]  # fmt: skip
    header = ["patch", "overlap", "largest", "accuracy of the facts below", "accuracy of its own facts"]
    lines = [Table(header, rows, numbers=(1, 2)).to_text()] if rows else []
    lines += [f"Taken out, because a later patch has another target: {name}" for name in found.taken_out]
    return "\n".join(lines)


def _change(before: Answers, after: Answers) -> str:
    if before.accuracy is None or after.accuracy is None:
        return ""
    return f"{before.accuracy:.3f} -> {after.accuracy:.3f} ({before.facts})"


COMMAND = Command(
    "apply", "Put patches on their base model, one after the other, and write the model.", _add_arguments, _apply
)
