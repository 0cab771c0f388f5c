"""Checkpoints from which a killed run resumes: written atomically, and only as large as what editing changed."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from editlab.errors import UserError
from editlab.runs.resume import ENTRIES, KEY, sums
from editlab.runs.summary import has_folder, is_trial, run_folder
from editlab.utils.compat import CheckpointHooks, save_unless_saved
from editlab.utils.files import atomic_file
from editlab.utils.torch_files import DamagedFileError, load_verified
from editlab.utils.validation import at_least_one

log = logging.getLogger(__name__)

LAST = "last"
"""Name of the checkpoint file, and the value of ``--ckpt_path`` that means the newest run's."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the file, on the same disk, and then moves it there: no reader sees half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save the checkpoint.

        Raises:
            EditLabError: The disk is full.
            UserError: The folder cannot be written to.
        """
        with atomic_file(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint after checking every entry of the file; it is never read as a pickle that may run code.

        Raises:
            FileNotFoundError: There is none.
            UserError: The file is damaged, or not one of editlab's; or ``weights_only`` is False.
        """
        refuse_pickles(weights_only)
        if not Path(path).exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        with _explained(path):
            return _ours(load_verified(Path(path), map_location or "cpu"), path)


def refuse_pickles(weights_only: bool | None) -> None:
    """Refuse ``weights_only: false``, with which torch would run code that a checkpoint holds.

    Raises:
        UserError: ``weights_only`` is False.
    """
    if weights_only is False:
        raise UserError(
            "weights_only is False, and loading a checkpoint would then run any code in it: leave it out; checkpoints "
            "of editlab hold only tensors, numbers and texts."
        )


def read_checkpoint(path: Path, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint without a Trainer; its tensors are mapped, and read from the disk when they are used.

    Args:
        path: the file.
        verify: check every entry of the file against its CRC-32 first, which reads the whole file.

    Raises:
        UserError: There is none, it is damaged, or not one of editlab's.
    """
    if not path.is_file():
        raise UserError(f"The checkpoint {str(path)!r} does not exist: check --ckpt_path.")
    with _explained(path):
        return _ours(load_verified(path, mmap=True, verify=verify), path)


@contextmanager
def _explained(path: Any) -> Iterator[None]:
    try:
        yield
    except DamagedFileError as error:
        if error.entry is not None:
            raise UserError(
                f"The checkpoint {path} is damaged (its entry {error.entry} has changed since it was written): give "
                "another, or start a new run."
            ) from error
        raise UserError(
            f"The checkpoint {path} cannot be read, because it is damaged or of another kind: give another, or "
            "start a new run."
        ) from error


def _ours(checkpoint: Any, path: Any) -> dict[str, Any]:
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"The checkpoint {path} is not editlab's: give one of its runs' checkpoints/{LAST}.ckpt.")
    saved = checkpoint[KEY] if isinstance(checkpoint[KEY], dict) else {}
    lacking = [name for name in ENTRIES if name not in saved] or [
        name for name in sums(saved["layers"]) if name not in checkpoint.get("state_dict", {})
    ]
    if lacking or "global_step" not in checkpoint:
        raise UserError(
            f"The checkpoint {path} lacks {', '.join(lacking) or 'global_step'}, as one of another version of editlab "
            "may do: give another, or start a new run."
        )
    for name in sums(saved["layers"]):
        total = checkpoint["state_dict"][name]
        if not isinstance(total, torch.Tensor) or total.dtype != torch.float32 or total.dim() != 2:
            raise UserError(f"The checkpoint {path} has no float32 matrix as {name}: give another, or start a new run.")
    return checkpoint


class EditCheckpoint(CheckpointHooks, ModelCheckpoint):
    """Writes ``checkpoints/last.ckpt`` in the run's folder every few batches, and at the end.

    A checkpoint holds what editing changed (sums of updates, ledger, memories, scores, the stream's position, random
    states) and not the language model, so its size does not grow with the model's depth.

    Args:
        every_n_batches: number of batches between two checkpoints. A killed run loses at most the work of these.
        keep_all: keep every checkpoint, as ``batch_N.ckpt`` after N batches, so that ``editlab revert --to_step N``
            finds it.

    Raises:
        UserError: ``every_n_batches`` is below 1.
    """

    def __init__(self, every_n_batches: int = 1, keep_all: bool = False) -> None:
        at_least_one("EditCheckpoint", every_n_batches=every_n_batches)
        super().__init__(filename=LAST, every_n_train_steps=every_n_batches, enable_version_counter=False)
        self.keep_all = keep_all

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the folder, and the atomic writer of files."""
        if self.dirpath is None and not has_folder(trainer.loggers) and stage == "fit":
            # Lightning's own choice may be the folder of an earlier run.
            self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def before_save(self, trainer: Trainer) -> None:
        """Write what the loggers hold: everything that a checkpoint says was logged has to be on the disk."""
        for logger in trainer.loggers:
            logger.save()

    def after_save(self, trainer: Trainer, path: str) -> None:
        """Keep the checkpoint under its own name too, if all are kept."""
        if self.keep_all and trainer.is_global_zero:
            self._keep(Path(path), trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint that a run resumes from, too: the run may have been killed before it was kept."""
        super().on_train_start(trainer, pl_module)
        if self.keep_all and trainer.ckpt_path and trainer.is_global_zero:
            self._keep(Path(trainer.ckpt_path), trainer.global_step)

    def _keep(self, last: Path, batches: int) -> None:
        with atomic_file(Path(str(self.dirpath)) / f"batch_{batches}.ckpt") as temporary:
            temporary.unlink()
            # A hard link costs nothing, and is safe: the last checkpoint is replaced, never overwritten in place.
            try:
                os.link(last, temporary)
            except OSError:  # not every file system has links
                shutil.copyfile(last, temporary)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last batches, and log the size of the file."""
        if is_trial(trainer):
            return
        save_unless_saved(self, trainer)
        if self.best_model_path and trainer.is_global_zero:
            size = Path(self.best_model_path).stat().st_size
            model = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            log.info("Checkpoint: %.1f MiB, %.2g%% of the model's size", size / 2**20, 100 * size / max(1, model))


def find_checkpoint(path: str) -> Path:
    """Return the checkpoint that a path means: the file itself, or ``checkpoints/last.ckpt`` of a run's folder.

    Raises:
        UserError: There is none.
    """
    given = Path(path).expanduser()
    if not path or not given.exists():
        raise UserError(f"The checkpoint {path!r} does not exist: check --ckpt_path.")
    if given.is_file():
        return given
    for found in (given / "checkpoints" / f"{LAST}.ckpt", given / f"{LAST}.ckpt"):
        if found.is_file():
            return found
    others = sorted(given.parent.glob(f"*/checkpoints/{LAST}.ckpt"), key=lambda found: found.stat().st_mtime)
    such = others[-1].parent.parent if others else ".../version_0"
    raise UserError(
        f"The folder {path} holds no checkpoints/{LAST}.ckpt: give a finished run's folder, such as {such}."
    )


def earlier_checkpoint(checkpoint: Path, step: int) -> Path:
    """Return the checkpoint after ``step`` batches of the run of ``checkpoint``, from the same folder.

    A checkpoint holds the sum of all updates and not each batch's, so earlier states exist only if they were kept.

    Raises:
        UserError: The run has fewer batches, or did not keep that state.
    """
    newest = read_checkpoint(checkpoint, verify=False)  # the one that is found is verified when its sums are read
    if not 0 < step <= newest["global_step"]:
        raise UserError(f"--to_step is {step}: {checkpoint} has {newest['global_step']} batches; give 0 to that.")
    if step == newest["global_step"]:
        return checkpoint
    found: dict[int, Path] = {}
    for path in sorted(checkpoint.parent.glob("*.ckpt")):
        with suppress(UserError):  # an unreadable file is not the one
            other = read_checkpoint(path, verify=False)
            if _same_run(other[KEY], newest[KEY]):
                found[other["global_step"]] = path
    if step in found:
        return found[step]
    raise UserError(
        f"No checkpoint in {checkpoint.parent} is of the state after batch {step} (there are those after "
        f"{', '.join(map(str, sorted(found)))}): run again with EditCheckpoint's keep_all to keep each batch's."
    )


def _same_run(earlier: dict[str, Any], later: dict[str, Any]) -> bool:
    """Tell whether one editor state is an earlier one of the same run: same weights, layers and first edits."""
    edits = earlier["ledger"]
    same = all(earlier.get(name) == later.get(name) for name in ("weights", "layers", "modules"))
    return same and edits == later["ledger"][: len(edits)]


def newest_checkpoint(runs: Path) -> Path:
    """Return ``last.ckpt`` of the newest run among ``runs``/version_*.

    Raises:
        UserError: There is none.
    """
    found = [
        (int(version[1]), path)
        for path in runs.glob(f"version_*/checkpoints/{LAST}.ckpt")
        if (version := re.fullmatch(r"version_(\d+)", path.parent.parent.name))
    ]
    if not found:
        raise UserError(f"There is no run with a checkpoint in {runs} to resume: start one without --ckpt_path.")
    return max(found)[1]


def run_version(checkpoint: Path, runs: Path) -> str | None:
    """Return the name of the folder in ``runs`` (``version_3``) of a checkpoint's run; None if it is elsewhere."""
    try:
        version, folder, _ = checkpoint.resolve().relative_to(runs.resolve()).parts
    except ValueError:
        return None
    return version if folder == "checkpoints" else None
