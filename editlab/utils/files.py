"""The cache folder, and atomic writes, after which a file or folder is complete or absent."""

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

from editlab.errors import EditLabError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full disk."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Error numbers of a path that may not be read or written."""
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_NO_SPACE = 1 << 20
"""Free bytes below which any failed write is reported as a full disk."""


_PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""Pattern of the names of files and folders that are still being written."""


def cache_dir() -> Path:
    """Return the folder for everything that can be downloaded or recomputed, without creating it.

    The environment variable ``EDITLAB_CACHE`` names it; default: the platform's cache folder of the user.
    """
    chosen = os.environ.get("EDITLAB_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("editlab")


def require_end(path: Path, name: str) -> None:
    """Refuse a device or a socket as a file that is read whole: reading it may never end.

    A pipe is allowed, because it ends with its writer, as in ``facts check <(zcat facts.json.gz)``.

    Args:
        path: the path; if nothing is there, or a folder, whoever reads it reports that.
        name: what the user called it.

    Raises:
        UserError: It is a device or a socket.
    """
    if path.is_char_device() or path.is_block_device() or path.is_socket():
        raise UserError(f"{name} is a device or a socket, which may never end: save its content as a file.")


def sha256(file: Path) -> str:
    """Return the SHA-256 digest of a file's content in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def expanded(path: str) -> str:
    """Return a path with ``~`` and environment variables replaced, as a shell would."""
    return os.path.expanduser(os.path.expandvars(path))


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path as the user would write it from here: relative, or whole if it is on another drive of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return os.path.abspath(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder next to ``path``, and rename it to ``path`` once the body has succeeded.

    If the body fails, its folder is removed and ``path`` stays as it was. If another process has filled ``path``
    in the meantime, that folder stays and the body's is removed: of two equal results the first is kept.

    Raises:
        EditLabError: The disk is full.
        UserError: The folder cannot be written to.
    """
    with _temporary_sibling(Path(path), Path.mkdir) as folder:
        yield folder
        try:
            folder.rename(path)
        except OSError:
            if _is_nonempty(Path(path)):
                return
            if not Path(path).is_dir():
                raise
            Path(path).rmdir()  # Windows renames to no folder that exists, not even to an empty one
            folder.rename(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file next to ``path``, and move it to ``path`` once the body has succeeded.

    If the body fails, its file is removed and ``path`` stays as it was. If two processes write the same file, the last
    one is kept; a reader sees one of the two complete files, never a mixture.

    Raises:
        EditLabError: The disk is full.
        UserError: The folder cannot be written to.
    """
    with _temporary_sibling(Path(path), Path.touch) as file:
        yield file
        os.replace(file, path)


def sweep(folder: Path) -> None:
    """Remove the half-written files of killed processes from ``folder``, to which no other process may be writing."""
    for path in folder.glob(".*.part"):
        if _PART.fullmatch(path.name):
            _delete(path)


def remove(folder: Path) -> None:
    """Remove a folder with its files; other processes see it complete or not at all."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")  # matches _PART
    with suppress(FileNotFoundError):  # another process removed it
        folder.rename(hidden)
    _delete(hidden)


@contextmanager
def _temporary_sibling(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a hidden temporary path next to ``target``, remove it afterwards, and explain disk errors."""
    # Not tempfile: only the owner may read its files, and a cache may be shared by a group.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.part"  # matches _PART
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
        _delete(temporary)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # it was moved after success, or was never created
            path.unlink()


def _explain(error: Exception, target: Path, temporary: Path) -> EditLabError | None:
    """Turn a failed write into an error message for the user; None for an error that is unrelated to the disk."""
    elsewhere = "set EDITLAB_CACHE to" if _within(target, cache_dir()) else "choose"
    code = error.errno if isinstance(error, OSError) else None
    # safetensors and torch.save raise their own errors when the disk is full.
    full = code in FULL or "No space left on device" in str(error)
    if full or (code not in FORBIDDEN and _disk_is_full(target)):  # a read-only disk has no free bytes either
        return EditLabError(
            f"no space on the disk to write {target}: free some, or {elsewhere} a folder on another disk"
        )
    # The error of a failed rename names both paths, the target second.
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    concerns_target = named is not None and (_within(Path(named), temporary) or _within(target, Path(named)))
    if concerns_target and code in FORBIDDEN:
        return UserError(f"no permission to write {target}: {elsewhere} a folder that you may write to")
    if concerns_target and code in _IN_THE_WAY:
        return UserError(f"cannot write {target}, because {named} is in its way: {elsewhere} another folder")
    return None


def _disk_is_full(target: Path) -> bool:
    try:
        return shutil.disk_usage(target.parent).free < _NO_SPACE
    except OSError:
        return False


def _is_nonempty(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
