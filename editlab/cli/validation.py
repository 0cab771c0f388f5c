"""Checking a recipe as ``fit`` would, without loading a model, facts or weights, and without writing anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback

from editlab.callback import EditCallback
from editlab.cli.training import EditLabCLI, without_run
from editlab.data import EditDataModule
from editlab.data.datamodule import KNOWN, PREFERRED, WORLDFACTS
from editlab.data.files import require_file
from editlab.editor import SequentialEditor
from editlab.edits.requirements import require_batch_size, require_compatible
from editlab.lm.text import HUB, SELF, read_file
from editlab.runs.watching import require_watchable

BUILTIN = "builtin"
"""Name of the held-out text that ships with editlab."""


def validate(files: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """Check a recipe: its settings, and that they fit each other.

    Settings that the model decides on, such as whether it has a layer, are not checked, and neither are the records of
    the facts.

    Args:
        files: YAML files or names of recipes and presets; the last one counts, as with several ``--config``.
        overrides: further arguments of ``fit``, such as ``--model.values.steps`` and ``20``.

    Returns:
        What ``fit`` would do, as a sentence.

    Raises:
        Exception: ``fit`` would refuse the recipe; the error is the one that ``fit`` would give.
    """
    configs = [word for file in files for word in ("--config", file)]
    with _without_news_of_lightning():
        cli = without_run([*configs, *overrides])
    editor, data, callbacks = cli.model, cli.datamodule, cli.trainer.callbacks  # type: ignore[attr-defined]
    assert isinstance(editor, SequentialEditor)
    assert isinstance(data, EditDataModule)
    check(editor, data, callbacks)
    return _plan(editor, data, callbacks, _folder(cli))


def check(editor: SequentialEditor, data: EditDataModule, callbacks: Sequence[Callback]) -> None:
    """Make sure that the parts of a run fit each other, as ``fit`` does once it has a model.

    Raises:
        UserError: They do not, or a file is missing that the run would read.
    """
    require_watchable(callbacks)
    require_batch_size(editor.method, data.batch_size)
    require_compatible(editor.solve_settings, editor.restore_between_batches, callbacks)
    for callback in callbacks:
        if isinstance(callback, EditCallback):
            callback.require_settings(editor)
    _require_files(editor, data)


@contextmanager
def _without_news_of_lightning() -> Iterator[None]:
    """Hide, inside the ``with``, what Lightning says about the seed and the devices of a run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require_files(editor: SequentialEditor, data: EditDataModule) -> None:
    """Make sure that the files exist that the run would read.

    Raises:
        UserError: One does not.
    """
    if data.path != WORLDFACTS:
        require_file(data.path)
    measured = editor.evaluation.settings
    texts = [*measured.texts.values()] if measured.heldout_tokens else []
    texts += [editor.moments.text] if editor.method.solves else []
    for text in texts:
        if text not in (BUILTIN, SELF) and not text.startswith(HUB):
            read_file(text)


def _folder(cli: EditLabCLI) -> Path | None:
    """Return the folder in which the run would get a folder of its own; None for a logger without one."""
    for logger in cli.trainer.loggers:
        if logger.save_dir is not None:
            return Path(logger.save_dir) / (logger.name or "")
    root = cli.trainer.default_root_dir
    return None if cli.trainer.loggers else Path(root)


def _plan(editor: SequentialEditor, data: EditDataModule, callbacks: Sequence[Callback], folder: Path | None) -> str:
    """Return what a run would do, as a sentence."""
    facts = "all facts" if data.limit is None else f"at most {data.limit} fact{'s' if data.limit > 1 else ''}"
    kept = {KNOWN: " that the model knows", PREFERRED: " whose truth the model prefers"}.get(data.keep, "")
    layers = ", ".join(map(str, editor.layer_numbers)) or "found by trying"
    names = [type(callback).__name__ for callback in callbacks if isinstance(callback, EditCallback)]
    parts = f", with {' and '.join(names)}" if names else ""
    where = f"; the run would go to {folder}" if folder is not None else ""
    return (
        f"edits {facts} of {data.path}{kept} in batches of {data.batch_size}, in {editor.language_model}, "
        f"layers {layers}, by {type(editor.method).__name__}{parts}{where}"
    )
