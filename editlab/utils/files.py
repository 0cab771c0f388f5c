"""Where downloads and measured artefacts are kept, and how each gets there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from editlab.errors import EditLabError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a disk that takes no more."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Error numbers of a place that one may not write to or read from."""
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_NEARLY_NOTHING = 1 << 20
"""Free bytes below which a failed write is put down to a full disk, whatever the writer said."""


_PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""Names of files and folders that are not whole yet."""


def cache_dir() -> Path:
    """Return the folder for everything that can be fetched or computed again; it is not created here.

    ``EDITLAB_CACHE`` names it; without that variable it is the user's cache folder of the platform.
    """
    chosen = os.environ.get("EDITLAB_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("editlab")


def sha256(file: Path) -> str:
    """Return the hex digest of a file's content, which a cached artefact made of it is kept under."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in the cache, on the CPU.

    Raises:
        EditLabError: It is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EditLabError(f"{path} can not be read ({error}): delete it, and it is made again.") from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside ``path``, and rename it to ``path`` once the body has succeeded.

    Where the body fails, its folder is removed and ``path`` is as it was. Where another process has meanwhile
    filled ``path``, that one stays and the body's work is dropped: of two equal results the first is kept.

    Raises:
        EditLabError: The disk is full.
        UserError: The place cannot be written to.
    """
    with _beside(Path(path), Path.mkdir) as folder:
        yield folder
        try:
            folder.rename(path)
        except OSError:
            if not _holds_something(Path(path)):
                raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of an empty file beside ``path``, and put it in place once the body has succeeded.

    Where the body fails, its file is removed and ``path`` is as it was. Of two processes that write one file
    the last is kept; a reader sees the one or the other whole, never a mixture.

    Raises:
        EditLabError: The disk is full.
        UserError: The place cannot be written to.
    """
    with _beside(Path(path), Path.touch) as file:
        yield file
        os.replace(file, path)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left half-written in ``folder``, where nobody else writes now."""
    for path in folder.glob(".*.part"):
        if _PART.fullmatch(path.name):
            _remove(path)


@contextmanager
def _beside(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Give a hidden sibling of ``target`` that is gone afterwards, and explain failures of the disk."""
    # Not tempfile: its files are closed to everyone else, and a cache may be shared by a group.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.part"  # as _PART knows it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        create(temporary)
        yield temporary
    except EditLabError:
        raise
    except Exception as error:
        explained = _explain(error, target, temporary)
        if explained is None:
            raise
        raise explained from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # not there any more after success, and never made where its folder could not be
            path.unlink()


def _explain(error: Exception, target: Path, temporary: Path) -> EditLabError | None:
    """Say what a failed write means to the user; None where it was not the disk's doing."""
    elsewhere = "set EDITLAB_CACHE to" if _within(target, cache_dir()) else "choose"
    code = error.errno if isinstance(error, OSError) else None
    # The writers of safetensors and of torch.save turn a full disk into an error of their own.
    full = code in FULL or "No space left on device" in str(error)
    if full or (code not in FORBIDDEN and _disk_is_full(target)):  # a place that is read only has no free bytes either
        return EditLabError(
            f"no space on the disk to write {target}: free some, or {elsewhere} a folder on another disk"
        )
    # A failed rename carries both of its names, the target second.
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    ours = named is not None and (_within(Path(named), temporary) or _within(target, Path(named)))
    if ours and code in FORBIDDEN:
        return UserError(f"no permission to write {target}: {elsewhere} a folder that you may write to")
    if ours and code in _IN_THE_WAY:
        return UserError(f"cannot write {target}, because {named} is in its way: {elsewhere} another folder")
    return None


def _disk_is_full(target: Path) -> bool:
    try:
        return shutil.disk_usage(target.parent).free < _NEARLY_NOTHING
    except OSError:
        return False


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
