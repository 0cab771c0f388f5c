"""Entering and leaving a run's folder: the lock, the reader and writer of checkpoints, and what a failed run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Trainer

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.runs.checkpoint import AtomicCheckpointIO
from editlab.runs.folder_lock import lock_folder, unlock_folder
from editlab.runs.run_table import OPENING, RunTable
from editlab.runs.summary import has_folder, is_trial, own_folder, run_folder


def enter_folder(trainer: Trainer, stage: str) -> None:
    """Lock the run's folder for this process, and make the Trainer read and write checkpoints safely.

    To be called by all ranks, before a checkpoint is read and before anything is written into the folder.

    Args:
        trainer: of the run.
        stage: the Trainer's verb. ``validate`` and ``test`` write only into the folder of a logger.

    Raises:
        UserError: Another process is writing into the folder.
    """
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if is_trial(trainer) or (stage != "fit" and not has_folder(trainer.loggers)):
        return
    folder = run_folder(trainer)
    try:
        ranks.on_first(lambda: lock_folder(folder))
    except UserError:
        for logger in trainer.loggers:
            if isinstance(logger, RunTable):
                logger.leave()
        raise


def leave_folder(trainer: Trainer) -> None:
    """Release the lock of the run's folder, on the rank that holds it."""
    folder = _folder(trainer)
    if folder is not None:
        unlock_folder(folder)


def abandon_folder(trainer: Trainer) -> None:
    """Release the lock after a failure, and remove a folder without results that no logger looks after."""
    leave_folder(trainer)
    own = own_folder(trainer)
    if own is not None and own.is_dir() and all(any(map(path.match, OPENING)) for path in own.iterdir()):
        shutil.rmtree(own, ignore_errors=True)


def _folder(trainer: Trainer) -> Path | None:
    """Return the run's folder without creating one, and without asking the other ranks."""
    own = own_folder(trainer)
    if own is not None or is_trial(trainer) or not has_folder(trainer.loggers):
        return own
    return Path(str(trainer.loggers[0].log_dir))
