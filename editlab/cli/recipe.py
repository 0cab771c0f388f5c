"""What the command line settles in a recipe before it is carried out, and ``config.yaml``: the recipe as it was.

That is the run's folder, the checkpoint that it goes on from, and the checkpoints that it writes.
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

from editlab.callback import EditCallback
from editlab.edits.edited_model import AUTO
from editlab.errors import UserError
from editlab.runs.checkpoint import LAST, EditCheckpoint, find_checkpoint, newest_checkpoint, run_version
from editlab.runs.folders import RunFolder, differing, flat_settings
from editlab.runs.logger import RunLogger
from editlab.runs.summary import run_folder
from editlab.utils.validation import at_least_one

FREE = (
    "model.language_model", "model.layers", "model.device_map", "model.values.batch_tokens",
    "model.evaluation.age_bins",
)  # fmt: skip
"""Settings of the model in which a run that goes on may differ: a checkpoint tells other weights and layers by
themselves, and the rest changes no edit."""


def settle(verb: Namespace) -> None:
    """Names the run's folder after the recipe, finds the run to go on from, and sees to checkpoints.

    Args:
        verb: the settings of ``fit``, ``validate`` or ``test``; changed in place.

    Raises:
        UserError: where ``--ckpt_path`` finds no checkpoint, and for what a run of edits can not have.
    """
    _check(verb)
    loggers = list(_loggers(verb.trainer.logger))
    for logger in loggers:
        if logger.get("name") == RunLogger.DEFAULT_NAME and verb.get("config"):
            logger["name"] = Path(str(verb.config[0])).stem
    if verb.get("ckpt_path") is not None:
        _go_on(verb, loggers)
    _add_checkpoint(verb.trainer)


def _check(verb: Namespace) -> None:
    for section in ("model", "data", "trainer"):
        if verb.get(section) is None:
            raise UserError(f"{section} is null: write its settings under it, or leave it out.")
    if verb.trainer.max_epochs not in (None, 1):
        raise UserError(
            f"trainer.max_epochs is {verb.trainer.max_epochs}: a run edits each of its facts once, in one pass; leave "
            "it out, and set model.passes for a batch that is to go through its layers again."
        )
    at_least_one("trainer", check_val_every_n_epoch=verb.trainer.check_val_every_n_epoch)


def _loggers(given: Any) -> Iterator[Namespace]:
    """The settings of the recipe's loggers that have a folder, the one of the run's files first."""
    for logger in given if isinstance(given, list) else [given]:
        settings = getattr(logger, "init_args", None)
        if settings is not None and "save_dir" in settings:
            yield settings


def _runs(logger: Namespace) -> Path:
    """The folder in which a logger makes one for each run."""
    return Path(logger.get("save_dir") or "lightning_logs") / (logger.get("name") or "")


def _go_on(verb: Namespace, loggers: list[Namespace]) -> None:
    """Finds the checkpoint that is meant; one from this recipe's runs goes on in its own run's folder."""
    verb.ckpt_path = str(_newest(loggers) if verb.ckpt_path == LAST else find_checkpoint(str(verb.ckpt_path)))
    for logger in loggers:  # elsewhere a run of that number may be another one
        if logger.get("version") is None and _runs(logger) == _runs(loggers[0]):
            logger["version"] = run_version(Path(verb.ckpt_path), _runs(logger))


def _newest(loggers: list[Namespace]) -> Path:
    """The newest run's checkpoint; that of the run which the recipe names, where it names one."""
    if not loggers:
        raise UserError(
            f"--ckpt_path {LAST} looks for the newest run in a logger's folder, and trainer.logger has none: name "
            "the checkpoint itself."
        )
    version = loggers[0].get("version")
    if version is None:
        return newest_checkpoint(_runs(loggers[0]))
    return find_checkpoint(str(_runs(loggers[0]) / (version if isinstance(version, str) else f"version_{version}")))


def goes_on(trainer: Trainer) -> bool:
    """Whether this run has a checkpoint that ``--ckpt_path last`` goes on from."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return bool(trainer.loggers) and any(folder and (Path(folder) / f"{LAST}.ckpt").is_file() for folder in folders)


def _run_of(checkpoint: Path) -> list[RunFolder]:
    """The run that wrote a checkpoint; none where it lies by itself."""
    folder = checkpoint.resolve().parent
    return [RunFolder(folder.parent)] if folder.name == "checkpoints" and not _is_users(folder.parent) else []


def _is_users(folder: Path) -> bool:
    """Whether it is the working directory, as of a run without a logger: a config.yaml there is the user's own."""
    return folder.resolve() == Path.cwd()


def _add_checkpoint(trainer: Namespace) -> None:
    """Adds editlab's checkpoints, unless the recipe has some of its own or wants none."""
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
    """The names of a class' subclasses, and of theirs."""
    for one in kind.__subclasses__():
        yield one.__name__
        yield from _names(one)


def _said(name: str, settings: Mapping[str, Any]) -> str:
    """A setting's value in words; that of a callback is whether it is there."""
    value = settings.get(name)
    return "absent" if value is None else "present" if value == name else str(value)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder; a run that goes on keeps the one that it was started with."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it, unless there is one and a checkpoint is gone on from, or the run has no folder of its own.

        Raises:
            UserError: where a run would go on with other edits than it was started with.
        """
        folder, checkpoint = RunFolder(run_folder(trainer)), self.config.get("ckpt_path")
        own = [folder] if trainer.loggers and not _is_users(folder.path) else []
        if checkpoint and stage == "fit":
            for started in (*own, *_run_of(Path(checkpoint))):
                if started.settings:
                    self._compare(started)
        if own and not (checkpoint and folder.settings):
            super().setup(trainer, pl_module, stage)

    def _compare(self, folder: RunFolder) -> None:
        then, now = folder.settings, flat_settings(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        callbacks = set(_names(EditCallback))
        changed = [
            f"{name}, {_said(name, then)} then and {_said(name, now)} now"
            for name in differing([then, now])
            if name not in FREE and (name.startswith("model.") or name.partition(".")[0] in callbacks)
        ]
        if changed:
            raise UserError(
                f"The run in {folder.path} would go on with other edits than it was started with "
                f"({'; '.join(changed[:3])}): set what differs as it was, or start a new run without --ckpt_path."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the layers that were found in the place of ``auto``, so that the file runs the same edits again."""
        path = run_folder(trainer) / self.config_filename
        if trainer.is_global_zero and self.already_saved and self.config.model.layers == AUTO:
            self.config.model.layers = pl_module.layer_numbers
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)
