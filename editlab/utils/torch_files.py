"""Reading files that ``torch.save`` wrote: verified entry by entry, and never as pickles that may run code."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_UNREADABLE = (
    RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    AssertionError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What zipfile, pickle and torch raise for bytes that make no sense."""


class DamagedFileError(Exception):
    """A file is damaged, or was not written by ``torch.save``."""

    def __init__(self, entry: str | None = None) -> None:
        super().__init__(entry or "the file as a whole")
        self.entry = entry
        """name of the entry whose content has changed; None if the file as a whole cannot be read"""


def load_verified(path: Path, map_location: Any = "cpu", mmap: bool = False, verify: bool = True) -> Any:
    """Return the content of a file, after comparing each entry with the CRC-32 that ``torch.save`` wrote next to it.

    ``torch.load`` ignores these checksums. Only tensors and plain values are read (``weights_only=True``).

    Args:
        path: the file.
        map_location: as for ``torch.load``.
        mmap: read tensors from the disk when they are used.
        verify: False skips the comparison, which reads the whole file.

    Raises:
        DamagedFileError: The file is damaged or of another kind.
        OSError: The file cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):  # torch would read it as a pickle
            raise DamagedFileError
        if verify:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise DamagedFileError(bad.partition("/")[2] or bad)
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except _UNREADABLE as error:
        raise DamagedFileError from error
