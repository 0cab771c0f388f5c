"""What a checkpoint holds of an editor, and what must agree for a run to go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from editlab.errors import UserError
from editlab.lm.fingerprint import architecture
from editlab.lm.precision import dtype_name
from editlab.runs.logger import RunLogger
from editlab.runs.summary import run_folder
from editlab.utils.files import sweep
from editlab.utils.machine import restore_threads
from editlab.utils.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from editlab.editor import SequentialEditor

KEY = "editor"
"""The editor's entry in a checkpoint."""


ENTRIES = (
    "language_model", "weights", "dtype", "layers", "batch_size", "ledger", "contexts", "evaluation", "table", "rng",
)  # fmt: skip
"""What no such entry can do without; the rest came with later versions."""


def save(editor: SequentialEditor, checkpoint: dict[str, Any]) -> None:
    """Puts what editing changed into ``checkpoint``, and takes the language model's weights out of it."""
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("lm.")}
    loggers = [logger for logger in editor.trainer.loggers if isinstance(logger, RunLogger)]
    checkpoint[KEY] = {
        "language_model": editor.language_model,
        "weights": editor.fingerprint,
        "architecture": architecture(editor.lm.model),
        "dtype": dtype_name(editor.lm.model.dtype),
        "precision": editor.trainer.precision,
        "layers": editor.layer_numbers,
        "modules": [editor.lm.anatomy.edit_name(layer) for layer in editor.layer_numbers],
        "adapted": sum(layer.adapter is not None for layer in editor.changed_layers),
        "independent": editor.restore_between_batches,
        "batch_size": editor.trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        "ledger": editor.ledger.state_dict(),
        "contexts": editor.contexts,
        "evaluation": editor.evaluation.state_dict(),
        "table": loggers[0].rows if loggers else {},
        "rng": rng_state(),
        "threads": torch.get_num_threads(),
    }


def sums(layers: Sequence[int]) -> list[str]:
    """The names that a checkpoint has the edited layers' sums under."""
    return [f"edited.{layer}.total" for layer in layers]


def adjusted_path(name: str) -> str | None:
    """The path in the language model of a sum by its name in a checkpoint; None where a callback did not adjust it."""
    return name.split(".")[1].replace("/", ".") if name.startswith("adjusted.") else None


def load(editor: SequentialEditor, checkpoint: dict[str, Any]) -> None:
    """Takes up what :func:`save` put there, but for the random states (:func:`restore_rng`).

    Raises:
        UserError: where the checkpoint is of another model or other layers.
    """
    saved = checkpoint[KEY]
    restore_threads(saved.get("threads"))
    if not editor.layer_numbers:  # they were found by the run that is gone on from
        editor.edit_at(saved["layers"])
    if saved["layers"] != editor.layer_numbers:
        raise UserError(
            f"The checkpoint edits layers {saved['layers']} and this run layers {editor.layer_numbers}: set "
            "model.layers as they were, or start a new run without --ckpt_path."
        )
    dtype = dtype_name(editor.lm.model.dtype)
    if saved["dtype"] != dtype:
        raise UserError(
            f"The checkpoint's model is in {saved['dtype']} and this run's in {dtype}: set trainer.precision as it was."
        )
    if saved["weights"] != editor.fingerprint:
        raise UserError(
            f"The checkpoint is of {saved['language_model']}, whose weights differ from those of "
            f"{editor.language_model}: set model.language_model to the model that it edits."
        )
    _check_architecture(saved.get("architecture", {}), architecture(editor.lm.model))
    for name in checkpoint["state_dict"]:
        path = adjusted_path(name)
        if path is not None:  # weights that a callback adjusted have to be there for Lightning to load
            editor.changed_layer(path)
    editor.ledger.load_state_dict(saved["ledger"])
    editor.contexts = list(saved["contexts"])
    editor.evaluation.load_state_dict(saved["evaluation"])
    editor.resumed = saved


def _check_architecture(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What two versions of transformers say of a model is compared where both say something."""
    other = next((name for name in saved if name in now and saved[name] != now[name]), None)
    if other is not None:
        raise UserError(
            f"The checkpoint's model has {saved[other]} as {other} in its config.json and this run's {now[other]}, so "
            "equal weights compute otherwise: set model.language_model to the model that it edits."
        )


def begin(editor: SequentialEditor) -> None:
    """Lets the loggers go on where the checkpoint was, or begin anew, and takes away what a kill left half-written.

    To be called only once nothing speaks against it.

    Raises:
        UserError: where a resumed run's precision, facts, their order or the batch size are not the checkpoint's.
    """
    if editor.resumed is not None:
        _check(editor, editor.resumed)
    folder = run_folder(editor.trainer)  # all ranks have to ask for it
    if editor.trainer.loggers and editor.trainer.is_global_zero:  # a kill leaves a checkpoint that is not whole
        for place in (folder, folder / "checkpoints"):
            sweep(place)
    for logger in editor.trainer.loggers:
        if isinstance(logger, RunLogger):  # a new run may have been given an old one's folder
            logger.share()
            logger.go_on(editor.resumed["table"] if editor.resumed else {}, editor.edits)


def _check(editor: SequentialEditor, saved: dict[str, Any]) -> None:
    precision = editor.trainer.precision
    if saved.get("precision", precision) != precision:
        raise UserError(
            f"The checkpoint's run had trainer.precision {saved['precision']} and this one has {precision}: set it as "
            "it was, or start a new run without --ckpt_path."
        )
    data = editor.trainer.datamodule  # type: ignore[attr-defined]
    if data.batch_size != saved["batch_size"]:
        raise UserError(
            f"The checkpoint's batches are of {saved['batch_size']} facts and this run's of "
            f"{data.batch_size}: set data.batch_size as it was."
        )
    for number, (entry, fact) in enumerate(zip(editor.ledger, data.facts, strict=False)):
        if entry.fact != fact:
            raise UserError(
                f"Fact {number} of the checkpoint is {entry.fact.question!r} -> {entry.fact.target_new!r}, and in "
                f"{data.path} it is {fact.question!r} -> {fact.target_new!r}: give the same file, limit and seed, or "
                "start a new run without --ckpt_path."
            )
    if len(data.facts) < editor.edits:
        raise UserError(
            f"The checkpoint has edited {editor.edits} facts and {data.path} gives {len(data.facts)}: give the same "
            "file and limit."
        )


def end(editor: SequentialEditor) -> None:
    """A run that came to its end is not gone on with: the Trainer passes over what it is given beyond.

    Raises:
        UserError: where further facts were given to one.
    """
    trainer, given = editor.trainer, len(editor.trainer.datamodule.facts)  # type: ignore[attr-defined]
    if editor.resumed is None or len(editor.resumed["ledger"]) < editor.edits:
        return
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and editor.edits < given:
        raise UserError(
            f"The run that is gone on from was finished with its {editor.edits} facts, and {given} are given: start a "
            "new run with all of them, without --ckpt_path."
        )


def restore_rng(editor: SequentialEditor) -> None:
    """Sets the random generators as they were; to be called when all set-up is done."""
    if editor.resumed is not None:
        set_rng_state(editor.resumed["rng"])
