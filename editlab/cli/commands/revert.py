"""``editlab revert``: removes all edits, those after a batch, or single facts, and writes the model."""

from __future__ import annotations

import logging

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.commands.export import write_delta
from editlab.cli.commands.writing import Writing, add_writing_arguments, require_delta_type
from editlab.errors import UserError
from editlab.runs.checkpoint import earlier_checkpoint, find_checkpoint
from editlab.runs.delta import Delta
from editlab.runs.patched_model import PatchedModel, read_patch
from editlab.runs.removal import SAMPLE, FactRemover, Removal, find_edits, removal_recipe
from editlab.runs.tables import Table, three_decimals
from editlab.utils.validation import above_zero, not_negative

log = logging.getLogger(__name__)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", type=str, help="A run's folder or checkpoint; with --facts also a delta or an earlier result."
    )
    parser.add_argument("--ckpt_path", help="The same as RUN.")
    parser.add_argument("--model", help="Name or path of the base model, if it has moved since the run.")
    add_writing_arguments(parser)
    parser.add_argument(
        "--to_step",
        type=int,
        default=0,
        help="Keep the first N batches; the run must have kept its checkpoint after them (EditCheckpoint's keep_all).",
    )
    parser.add_argument(
        "--facts",
        nargs="+",
        type=str,
        help="Take only these facts out, and hold all others: each by 'subject|prompt', or by its subject if no other "
        "edit has it.",
    )
    parser.add_argument(
        "--hold",
        type=float,
        help="With --facts: weight of each other fact's key in the solve. Default: that of the run's memory.",
    )
    parser.add_argument(
        "--sample", type=int, default=SAMPLE, help="With --facts: most other facts that are asked before and after."
    )
    parser.add_argument("--delta-only", action="store_true", help="With --facts: write only the delta of the result.")


def _revert(given: Namespace) -> None:
    path = _path(given)
    writing = Writing.of(given)
    if given.facts:
        _take_out(given, path, writing)
        return
    if given.delta_only or given.hold is not None:
        raise UserError("--delta-only and --hold are settings of --facts: name the facts to take out, or remove them.")
    checkpoint = find_checkpoint(path)
    if given.to_step == 0:
        writing.unedited(Delta.from_checkpoint(checkpoint, usable=False), given.model)
    else:
        writing.edited(Delta.from_checkpoint(earlier_checkpoint(checkpoint, given.to_step)), given.model)


def _path(given: Namespace) -> str:
    if (given.run is None) == (given.ckpt_path is None):
        raise UserError("revert needs one run: give its folder or checkpoint, once, as RUN or as --ckpt_path.")
    return given.run if given.run is not None else given.ckpt_path


def _take_out(given: Namespace, path: str, writing: Writing) -> None:
    if given.to_step:
        raise UserError("--facts takes facts out and --to_step goes back to a batch: give one of the two.")
    if given.delta_only:
        require_delta_type(given.dtype)
    above_zero("revert", hold=given.hold)
    not_negative("revert", sample=given.sample)
    delta = read_patch(path)
    find_edits(delta.history.edits, given.facts)  # before a model is loaded, which takes longer
    removal_recipe(delta, given.hold)
    remover = FactRemover(PatchedModel(delta, given.model, writing.device), delta, given.hold)
    removal = remover.remove(given.facts, given.sample)
    log.info("\n%s\n", render(removal))
    if given.delta_only:
        write_delta(removal.delta, writing.out)
    else:
        writing.edited(removal.delta, given.model, with_delta=True)
    log.info("Take out more: editlab revert %s --facts ... --out DIR", given.out)


def render(removal: Removal) -> str:
    """The facts that were taken out and what else moved, as two tables."""
    facts = Table(
        ["taken out", "target gone", "original answer back"],
        [
            [f"{edit.subject}|{edit.prompt}", _yes(gone), _yes(back)]
            for edit, gone, back in zip(removal.edits, removal.gone, removal.back, strict=True)
        ],
    )
    before, after = removal.before, removal.after
    others = Table(
        ["others", "before", "after"],
        [
            [
                f"accuracy of {before.facts} other edits",
                three_decimals(before.accuracy),
                three_decimals(after.accuracy),
            ],
            ["accuracy of their neighbors", three_decimals(before.neighbors), three_decimals(after.neighbors)],
        ],
        numbers=(1, 2),
    )
    norms = ", ".join(f"{norm:.2g} (layer {layer})" for layer, norm in removal.update_norms.items())
    return f"{facts.to_text()}\n\n{others.to_text()}\n\n||removal|| / ||W||: {norms}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


COMMAND = Command(
    "revert", "Remove all edits, those after a batch, or single facts, and write the model.", _add_arguments, _revert
)
