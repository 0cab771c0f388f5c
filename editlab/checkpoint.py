"""Checkpoints that a killed run goes on from: whole or not there, and only as large as what editing changed."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from editlab.errors import UserError
from editlab.lm.cache import atomic_file
from editlab.resume import KEY

log = logging.getLogger(__name__)

LAST = "last"
"""Name of the checkpoint file, and what ``--ckpt_path`` takes for the newest run's."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and moves it into place, on one disk, so that no reader sees half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves the checkpoint.

        Raises:
            EditLabError: The disk is full.
            UserError: The place can not be written to.
        """
        with atomic_file(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            FileNotFoundError: There is none.
            UserError: The file is damaged, or not one of editlab's.
        """
        try:
            checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"The checkpoint {path} can not be read; give another, or start anew.") from error
        if KEY not in checkpoint:
            raise UserError(f"The checkpoint {path} is not editlab's: give one of its runs' checkpoints/{LAST}.ckpt.")
        return checkpoint


class EditCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder: every so many batches, and at the end.

    It holds what editing changed (sums of updates, ledger, memories, scores, the stream's position, random states)
    and not the language model, so its size does not grow with the model's depth.

    Args:
        every_n_batches: batches between two checkpoints. A killed run loses at most the work of these.

    Raises:
        UserError: where it is under 1.
    """

    def __init__(self, every_n_batches: int = 1) -> None:
        if every_n_batches < 1:
            raise UserError(f"EditCheckpoint.every_n_batches is {every_n_batches}: it must be at least 1.")
        super().__init__(filename=LAST, every_n_train_steps=every_n_batches, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder, and how files are written."""
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # first: what the checkpoint says was logged has to be on the disk
        super()._save_checkpoint(trainer, filepath)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last batches, and says how large the file is."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.best_model_path and trainer.is_global_zero:
            size = Path(self.best_model_path).stat().st_size
            model = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            log.info("Checkpoint: %.1f MiB, %.2g%% of the model's size", size / 2**20, 100 * size / max(1, model))


def newest_checkpoint(runs: Path) -> Path:
    """The newest run's ``last.ckpt`` among ``runs``/version_*.

    Raises:
        UserError: where there is none.
    """
    found = [
        (int(version[1]), path)
        for path in runs.glob(f"version_*/checkpoints/{LAST}.ckpt")
        if (version := re.fullmatch(r"version_(\d+)", path.parent.parent.name))
    ]
    if not found:
        raise UserError(f"There is no run with a checkpoint in {runs} to go on from: start one without --ckpt_path.")
    return max(found)[1]


def run_version(checkpoint: Path, runs: Path) -> str | None:
    """The folder in ``runs`` (such as ``version_3``) that a checkpoint belongs to; None where it lies elsewhere."""
    try:
        version, folder, _ = checkpoint.resolve().relative_to(runs.resolve()).parts
    except ValueError:
        return None
    return version if folder == "checkpoints" else None
