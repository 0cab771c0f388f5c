"""The read-through cache on disk; results are keyed by their inputs and verified by a digest when they are read.

Every file begins with one line that holds a digest of the rest. A file whose digest does not match is damaged: it is
removed, a warning is logged, and its content is recomputed. Files are written atomically, so that several runs
may share a folder.

:class:`DiskCache` keeps one result a file. :class:`RowCache` keeps many small rows, with all rows that were computed
together in one file. :func:`cached_folder` keeps a folder of files that other libraries read. None of them depends on
ranks: the argument ``on_first`` runs a function on the first rank alone and returns its result on all ranks
(:func:`editlab.distributed.ranks.on_first`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from editlab.utils.files import atomic_file, atomic_folder, remove

log = logging.getLogger(__name__)

T = TypeVar("T")
Content = bytes | mmap.mmap

_HEAD = b"editlab-cache-1 %s\n"
SUFFIX = ".cache"
"""Suffix of every cache file."""
DIGESTS = f"digests{SUFFIX}"
"""File in a cached folder that holds the digests of all its other files, by name."""


class _DamagedError(Exception):
    """Raised when a file's content does not match its digest."""


def _here(work: Callable[[], Any]) -> Any:
    """Run ``work`` and return its result; this is the ``on_first`` of a single process."""
    return work()


def key_of(**parts: Any) -> str:
    """Return a key of 32 hexadecimal digits: the digest of all inputs of a result.

    Args:
        parts: the inputs by name, as plain values (numbers, strings, lists, dicts with string keys).

    Raises:
        TypeError: An input is of another type.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest(content: Content) -> str:
    """Return the XXH3 digest of a file's content, 32 hexadecimal digits.

    It detects accidental changes at the speed of memory; it does not protect against deliberate forgery.
    """
    return xxhash.xxh3_128_hexdigest(content)


def write_checked(path: Path, content: bytes) -> None:
    """Write a line with the digest of ``content``, followed by ``content``, atomically.

    Raises:
        EditLabError: The disk is full.
        UserError: The folder cannot be written to.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(_HEAD % digest(content).encode())
        file.write(content)


def read_checked(path: Path) -> bytes | None:
    """Return the content that :func:`write_checked` wrote; None if the file is missing or was damaged (then removed).

    Raises:
        OSError: The file exists but cannot be read.
    """
    try:
        return _verified(path)
    except (FileNotFoundError, NotADirectoryError):  # the write that follows names a file that is in the folder's way
        return None
    except _DamagedError:
        _discard(path)
        return None


def _verified(path: Path) -> bytes:
    head, _, content = path.read_bytes().partition(b"\n")
    if head + b"\n" != _HEAD % digest(content).encode():
        raise _DamagedError
    return content


def _discard(path: Path) -> None:
    log.warning("%s is damaged: its content is recomputed.", path)
    with suppress(OSError):  # in a read-only folder the file stays, and is skipped each time
        path.unlink()


@dataclass(frozen=True)
class Codec(Generic[T]):
    """Conversion of a result to bytes and back; ``load`` raises ValueError, TypeError or KeyError for bad bytes."""

    dump: Callable[[T], bytes]
    load: Callable[[bytes], T]


TENSORS: Codec[dict[str, Tensor]] = Codec(safetensors.torch.save, safetensors.torch.load)
"""Codec of tensors by name; loaded tensors are on the CPU."""


class DiskCache(Generic[T]):
    """A folder of cached results, one file each.

    Args:
        folder: the folder of the files; it is created by the first write.
        codec: converts results to the content of files and back.
    """

    def __init__(self, folder: Path, codec: Codec[T]) -> None:
        self.folder = folder
        self.codec = codec

    def path(self, key: str) -> Path:
        """Return the path of the file for ``key`` (:func:`key_of`)."""
        return self.folder / f"{key}{SUFFIX}"

    def read(self, key: str) -> T | None:
        """Return the result that was stored under ``key``; None if there is none or it was damaged."""
        content = read_checked(self.path(key))
        if content is None:
            return None
        try:
            return self.codec.load(content)
        except (ValueError, TypeError, KeyError):  # undamaged, but written by another version of editlab
            _discard(self.path(key))
            return None

    def write(self, key: str, result: T) -> None:
        """Store ``result`` under ``key``."""
        write_checked(self.path(key), self.codec.dump(result))

    def fetch(self, key: str, compute: Callable[[], T], on_first: Callable[[Callable[[], Any]], Any] = _here) -> T:
        """Return the stored result of ``key``; if there is none, compute it on all ranks and store it on the first."""
        found: T | None = on_first(lambda: self.read(key))
        if found is not None:
            return found
        result = compute()
        on_first(lambda: self.write(key, result))
        return result


class RowCache:
    """A folder of cached rows of numbers, all of the same length and type, by name.

    Rows that were computed together are written atomically as one file, so a run that is killed and resumed finds all
    of them or none. If two runs wrote a row of the same name, the one that was read first is used.

    Args:
        folder: the folder of the files; it is created by the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[Path] = set()
        self._tables: list[Tensor] = []
        self._index: dict[str, tuple[int, int]] = {}  # name -> table, row

    def fetch(
        self,
        names: Sequence[str],
        compute: Callable[[list[int]], Tensor],
        on_first: Callable[[Callable[[], Any]], Any] = _here,
    ) -> Tensor:
        """Return the rows of ``names``, [n, width]; rows that are not stored yet are computed and stored.

        A row that holds a non-finite number is not stored.

        Args:
            names: 32 hexadecimal digits each, as :func:`key_of` returns them; repeats are allowed.
            compute: returns rows [m, width] on the CPU for the indices of m distinct names.
            on_first: runs a function on the first rank, which alone reads and writes the folder.
        """
        known, rows = on_first(lambda: self._look(names))
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            first.setdefault(name, index)
        missing = [index for name, index in first.items() if name not in known]
        if missing:
            found = compute(missing).contiguous()
            missing_names = [names[index] for index in missing]
            on_first(lambda: self._keep(missing_names, found))
            rows = found if rows is None else torch.cat([rows, found])
            known = [*known, *missing_names]
        if rows is None:
            raise ValueError("RowCache.fetch needs at least one name.")
        index_of = {name: index for index, name in enumerate(known)}
        return rows[[index_of[name] for name in names]]

    def _look(self, names: Sequence[str]) -> tuple[list[str], Tensor | None]:
        """Read files that were added since the last call; return the names that are stored, and their rows."""
        for path in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._read):
            self._read.add(path)
            table = _load_table(path)
            if table is not None:
                self._add(*table)
        known = [name for name in dict.fromkeys(names) if name in self._index]
        if not known:
            return [], None
        return known, torch.stack([self._tables[table][row] for table, row in map(self._index.__getitem__, known)])

    def _add(self, names: Sequence[str], rows: Tensor) -> None:
        for row, name in enumerate(names):
            self._index.setdefault(name, (len(self._tables), row))
        self._tables.append(rows)

    def _keep(self, names: Sequence[str], rows: Tensor) -> None:
        finite = rows.isfinite().all(1)
        names = [name for name, keep in zip(names, finite.tolist(), strict=True) if keep]
        rows = rows[finite]
        if not names:
            return
        path = self.folder / f"{key_of(names=sorted(names))}{SUFFIX}"
        if path in self._read or read_checked(path) is None:  # another run may have written the same rows meanwhile
            table = {"names": torch.tensor([list(bytes.fromhex(name)) for name in names]).byte(), "rows": rows}
            write_checked(path, safetensors.torch.save(table))
        self._add(names, rows)
        self._read.add(path)


def _load_table(path: Path) -> tuple[list[str], Tensor] | None:
    """Read one file of a :class:`RowCache`: the names and their rows [n, width]; None if it was damaged."""
    content = read_checked(path)
    if content is None:
        return None
    table = safetensors.torch.load(content)
    return [bytes(name).hex() for name in table["names"].tolist()], table["rows"]


def cached_folder(folder: Path, make: Callable[[Path], None], parts: Sequence[Sequence[str]] = ()) -> Path:
    """Return ``folder`` after verifying its files' digests; if it is missing or damaged, it is made first.

    Several processes may call this at the same time.

    Args:
        folder: a folder in the cache.
        make: fills an empty folder.
        parts: groups of file names; the folder must have at least one file of each group.

    Raises:
        EditLabError: The disk is full; or what ``make`` raises.
        UserError: The folder cannot be written to.
    """
    fault = _fault_of(folder, parts) if folder.exists() else None
    if fault:
        log.warning("%s is damaged (%s): it is recreated.", folder, fault)
        remove(folder)
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            make(unfinished)
            _write_digests(unfinished)
    return folder


def _fault_of(folder: Path, parts: Sequence[Sequence[str]]) -> str | None:
    """Describe what is wrong with a cached folder in a few words; None if nothing is."""
    for names in parts:
        if not any((folder / name).is_file() for name in names):
            return f"{names[0]} is missing"
    try:
        expected: dict[str, str] = json.loads(_verified(folder / DIGESTS))
    except FileNotFoundError:  # made by an editlab version without digests: only later damage can be noticed
        _write_digests(folder)
        return None
    except _DamagedError:
        return f"{DIGESTS} has changed"
    for name, known in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest_of(file) != known:
            return f"{name} has changed"
    return None


def _write_digests(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    digests = {path.relative_to(folder).as_posix(): _digest_of(path) for path in files}
    write_checked(folder / DIGESTS, json.dumps(digests, indent=1).encode())


def _digest_of(file: Path) -> str:
    if not file.stat().st_size:  # mmap rejects empty files
        return digest(b"")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return digest(content)
