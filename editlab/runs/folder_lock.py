"""The lock of a run's folder: one process at a time writes into it."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from editlab.errors import UserError

log = logging.getLogger(__name__)

NAME = ".lock"
"""Name of the lock file; it stays when a run ends, and it is the operating system's lock on it that counts."""

_PATIENCE = 0.25
"""Seconds to wait for a lock: :func:`is_locked` of another process may hold it for an instant."""

_held: dict[Path, FileLock] = {}
"""Folder -> its lock, for the folders that this process has locked."""


def lock_folder(folder: Path) -> None:
    """Lock a run's folder for this process, until :func:`unlock_folder` or the end of the process, however it ends.

    The lock belongs to the process: locking a folder again is allowed. The operating system releases it when the
    process ends, even by ``kill -9``, so a killed run never blocks the one that resumes it. On a file system without
    locks the folder is used without one, and a warning is logged.

    Args:
        folder: the run's folder; it is created if it does not exist.

    Raises:
        UserError: Another process has locked the folder.
        OSError: The folder cannot be written to.
    """
    folder = folder.resolve()
    if folder in _held:
        if (folder / NAME).exists():
            return
        unlock_folder(folder)  # the folder was removed, and may belong to another process by now
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout as error:
        raise UserError(
            f"Another process is writing into the run's folder {folder}: wait until it ends or stop it, or start a new "
            "run without --ckpt_path."
        ) from error
    except NotImplementedError:
        log.warning("The file system of %s has no locks: do not resume a run twice at the same time.", folder)
        return
    _held[folder] = lock


def is_locked(folder: Path) -> bool | None:
    """Tell whether a process, this one included, is writing into a run's folder; nothing is written for the answer.

    Returns:
        None if that cannot be known, because the lock file is not ours to lock, or the file system has no locks.
    """
    folder = folder.resolve()
    if folder in _held:
        return True
    if not (folder / NAME).is_file():
        return False
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None
    with suppress(OSError):
        lock.release(force=True)
    return False


def unlock_folder(folder: Path) -> None:
    """Release the lock of a folder, if this process holds it."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        with suppress(OSError):
            lock.release(force=True)
