"""Completing a recipe before it runs, and ``config.yaml``, the complete recipe in the run's folder.

What is completed is the name of the run's folder, the checkpoint to resume from, and the callback that writes
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from editlab.callback import EditCallback
from editlab.edits.edited_model import AUTO
from editlab.errors import UserError
from editlab.runs.checkpoint import (
    LAST,
    EditCheckpoint,
    find_checkpoint,
    newest_checkpoint,
    refuse_pickles,
    run_version,
)
from editlab.runs.folders import RunFolder, differing, flat_settings
from editlab.runs.logger import RunLogger, as_parameters
from editlab.runs.run_table import DEFAULT_FOLDER, DEFAULT_NAME, CSVRunLogger, RunTable
from editlab.runs.summary import has_folder, is_trial, resume_in_own_folder, run_folder
from editlab.runs.workplace import enter_folder
from editlab.utils.files import atomic_file, expanded
from editlab.utils.validation import at_least_one

MAY_DIFFER = (
    "model.language_model", "model.layers", "model.device_map", "model.values.batch_tokens",
    "model.evaluation.age_bins",
)  # fmt: skip
"""Settings of the model that may change when a run is resumed: other weights and layers are recognised from the
checkpoint itself, and the remaining settings do not change an edit."""


def complete(verb: Namespace) -> None:
    """Name the run's folder after the recipe, find the checkpoint to resume from, and add the callback that writes one.

    Args:
        verb: the settings of ``fit``, ``validate`` or ``test``; changed in place.

    Raises:
        UserError: ``--ckpt_path`` finds no checkpoint, or a setting makes no sense for a run of edits.
    """
    _check(verb)
    _put_own_logger_first(verb.trainer)
    _choose_folder(verb)
    loggers = list(_loggers(verb.trainer.logger))
    for logger in loggers:
        if logger.get("name") == DEFAULT_NAME and verb.get("config"):
            logger["name"] = Path(str(verb.config[0])).stem
    _refuse_second_table(verb.trainer.logger)
    if verb.get("ckpt_path") is not None:
        _find_run(verb, loggers)
    _add_checkpoint(verb.trainer)


def _check(verb: Namespace) -> None:
    for section in ("model", "data", "trainer"):
        if verb.get(section) is None:
            raise UserError(f"{section} is null: write its settings under it, or leave it out.")
    if verb.trainer.max_epochs not in (None, 1):
        raise UserError(
            f"trainer.max_epochs is {verb.trainer.max_epochs}: a run edits each of its facts once, in one pass; leave "
            "it out, and set model.passes to let each batch go through its layers several times."
        )
    at_least_one("trainer", check_val_every_n_epoch=verb.trainer.check_val_every_n_epoch)
    refuse_pickles(verb.get("weights_only"))


def _choose_folder(verb: Namespace) -> None:
    """Let ``trainer.default_root_dir`` be the folder that holds all runs, with or without a logger.

    ``~`` and variables are replaced once, here: of Lightning's parts some replace them and some do not.
    """
    for settings in (verb.trainer, *_loggers(verb.trainer.logger)):
        for name in ("default_root_dir", "save_dir"):
            if settings.get(name) is not None:
                settings[name] = expanded(str(settings[name]))
    root, given = verb.trainer.default_root_dir, verb.trainer.logger
    if _has_none(given) and root is None:
        name = Path(str(verb.config[0])).stem if verb.get("config") else DEFAULT_NAME
        verb.trainer.default_root_dir = str(Path(DEFAULT_FOLDER) / name)
    elif root is not None:
        for logger in _loggers(given):
            if logger.get("save_dir") == DEFAULT_FOLDER:
                logger["save_dir"] = str(Path(root) / DEFAULT_FOLDER)


def _put_own_logger_first(trainer: Namespace) -> None:
    """Let a logger of editlab's be the first, whose folder is the run's; a recipe without one gets a CSVRunLogger.

    Raises:
        UserError: There are several of editlab's.
    """
    if trainer.logger is None or isinstance(trainer.logger, bool) or trainer.logger == []:
        return
    given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    own = [logger for logger in given if _is_a(str(logger.get("class_path", "")), RunTable)]
    if len(own) > 1:
        raise UserError(
            "trainer.logger has several of RunLogger and CSVRunLogger, each with a folder and a table of the run: "
            "leave one of them (RunLogger also writes the table)."
        )
    others = [logger for logger in given if logger not in own]
    if not own:
        path = f"{CSVRunLogger.__module__}.{CSVRunLogger.__name__}"
        settings = Namespace(save_dir=DEFAULT_FOLDER, name=DEFAULT_NAME, version=None)
        own = [Namespace(class_path=path, init_args=settings)]
    if others:
        trainer.logger = [*own, *others]


def _refuse_second_table(given: Any) -> None:
    """Refuse a CSVLogger of Lightning's in the folder of the runs.

    Raises:
        UserError: It would write its table, which has the same name, over the run's when that is resumed.
    """
    loggers = [one for one in (given if isinstance(given, list) else [given]) if list(_loggers(one))]
    for other in loggers[1:]:
        kind = str(other.class_path)
        alike = _is_a(kind, CSVLogger) and not _is_a(kind, RunTable)
        if alike and _runs(other.init_args) == _runs(loggers[0].init_args):
            raise UserError(
                f"trainer.logger has a CSVLogger in {_runs(other.init_args)}, where the runs are, and its metrics.csv "
                "would be written over theirs: leave it out, as theirs has the same numbers, or give it another name."
            )


def _has_none(logger: Any) -> bool:
    """Tell whether the setting ``trainer.logger`` switches logging off; null is Lightning's default logger."""
    return logger is False or logger == []


def _loggers(given: Any) -> Iterator[Namespace]:
    """Yield the settings of the loggers that write into a folder; the first one's folder is the run's.

    Those that keep the numbers of all runs in one place, such as that of MLflow, have no folder for a run.
    """
    for logger in given if isinstance(given, list) else [given]:
        kind, settings = str(getattr(logger, "class_path", "")), getattr(logger, "init_args", None)
        if settings is not None and (_is_a(kind, CSVLogger) or _is_a(kind, TensorBoardLogger)):
            yield settings


def _runs(logger: Namespace) -> Path:
    """Return the folder in which a logger creates a folder for each run."""
    return Path(logger.get("save_dir") or "lightning_logs") / (logger.get("name") or "")


def _find_run(verb: Namespace, loggers: list[Namespace]) -> None:
    """Resolve ``--ckpt_path``; a run of this very recipe is resumed in its own folder."""
    if verb.ckpt_path != LAST:
        found = find_checkpoint(str(verb.ckpt_path))
    elif _has_none(verb.trainer.logger):
        found = newest_checkpoint(Path(verb.trainer.default_root_dir))
    else:
        found = _newest(loggers)
    verb.ckpt_path = str(found)
    for logger in loggers:  # in another folder, that number may be of another run
        if logger.get("version") is None and _runs(logger) == _runs(loggers[0]):
            logger["version"] = run_version(Path(verb.ckpt_path), _runs(logger))


def _newest(loggers: list[Namespace]) -> Path:
    """Return the checkpoint of the run that the recipe names; default: of the newest run."""
    if not loggers:
        raise UserError(
            f"--ckpt_path {LAST} looks for the newest run in a logger's folder, and trainer.logger has none: name "
            "the checkpoint itself."
        )
    version = loggers[0].get("version")
    if version is None:
        return newest_checkpoint(_runs(loggers[0]))
    return find_checkpoint(str(_runs(loggers[0]) / (version if isinstance(version, str) else f"version_{version}")))


def can_resume(trainer: Trainer) -> bool:
    """Tell whether this run has a checkpoint, so that ``--ckpt_path last`` resumes it."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return any(folder and (Path(folder) / f"{LAST}.ckpt").is_file() for folder in folders)


def _run_of(checkpoint: Path) -> list[RunFolder]:
    """Return the run that wrote a checkpoint, as a list; [] for a checkpoint outside of a run's folder."""
    folder = checkpoint.resolve().parent
    return [RunFolder(folder.parent)] if folder.name == "checkpoints" and not _is_users(folder.parent) else []


def _is_users(folder: Path) -> bool:
    """Tell whether this is the working directory, where config.yaml is the user's."""
    return folder.resolve() == Path.cwd()


def _add_checkpoint(trainer: Namespace) -> None:
    """Add the callback that writes checkpoints, unless the recipe has one or switches checkpoints off."""
    given = trainer.callbacks or []
    callbacks = given if isinstance(given, list) else [given]
    own = any(_is_a(str(callback.get("class_path", "")), ModelCheckpoint) for callback in callbacks)
    if trainer.enable_checkpointing is not False and not own:
        path = f"{EditCheckpoint.__module__}.{EditCheckpoint.__name__}"
        trainer.callbacks = [*callbacks, Namespace(class_path=path, init_args=Namespace(every_n_batches=1))]


def _is_a(path: str, kind: type) -> bool:
    found = locate(path)
    return isinstance(found, type) and issubclass(found, kind)


def _names(kind: type[Any]) -> Iterator[str]:
    """Yield the names of all direct and indirect subclasses."""
    for subclass in kind.__subclasses__():
        yield subclass.__name__
        yield from _names(subclass)


def _in_words(name: str, settings: Mapping[str, Any]) -> str:
    """Return a setting's value in words; for a callback, whether the recipe has it."""
    value = settings.get(name)
    return "absent" if value is None else "present" if value == name else str(value)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; a resumed run keeps the one that it was started with."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, unless a resumed run has one already or the run has no folder of its own.

        Raises:
            UserError: A resumed run's settings would make other edits than those it was started with.
        """
        checkpoint = self.config.get("ckpt_path")
        if checkpoint and stage == "fit":
            resume_in_own_folder(trainer, Path(checkpoint))
        enter_folder(trainer, stage)
        keeps = not is_trial(trainer) and (stage == "fit" or has_folder(trainer.loggers))
        own = [
            folder for folder in map(RunFolder, [run_folder(trainer)] if keeps else []) if not _is_users(folder.path)
        ]
        if checkpoint and stage == "fit":
            for started in (*own, *_run_of(Path(checkpoint))):
                if started.settings:
                    self._compare(started)
        for folder in own:
            if trainer.is_global_zero and not self.already_saved and not (checkpoint and folder.settings):
                self._write(folder.path)
                self.already_saved = True

    def _write(self, folder: Path) -> None:
        with atomic_file(folder / self.config_filename) as temporary:
            self.parser.save(self.config, str(temporary), skip_none=False, overwrite=True, multifile=self.multifile)

    def _settings(self) -> dict[str, Any]:
        return flat_settings(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings, as for TensorBoard's HParams page."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_settings(self._settings())
            elif not isinstance(logger, RunTable):
                logger.log_hyperparams(as_parameters(self._settings()))

    def _compare(self, folder: RunFolder) -> None:
        then, now = folder.settings, self._settings()
        callbacks = set(_names(EditCallback))
        changed = [
            f"{name}: {_in_words(name, then)} then, {_in_words(name, now)} now"
            for name in differing([then, now])
            if name not in MAY_DIFFER and (name.startswith("model.") or name.partition(".")[0] in callbacks)
        ]
        if changed:
            raise UserError(
                f"The run in {folder.path} was started with other settings of its edits "
                f"({'; '.join(changed[:3])}): set them as they were, or start a new run without --ckpt_path."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace ``layers: auto`` by the layers that were found, so that the file runs the same edits again."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and self.already_saved and self.config.model.layers == AUTO:
            self.config.model.layers = pl_module.layer_numbers
            self._write(folder)
