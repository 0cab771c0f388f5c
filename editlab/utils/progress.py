"""What a run shows while it goes on: of several ranks one speaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

_wanted: ContextVar[bool] = ContextVar("_wanted", default=True)


def speaks() -> bool:
    """Whether this process is rank 0, as its launcher has it: also before the ranks have found each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Progress bars inside the ``with``, or none at all: neither ours nor those of transformers."""
    before = transformers_logging.is_progress_bar_enabled()
    token = _wanted.set(wanted)
    if not wanted:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        _wanted.reset(token)
        if before:
            transformers_logging.enable_progress_bar()


def progress(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm:
    """A bar that goes when it is done, on rank 0 and where bars are wanted; else there is only the count.

    Args:
        iterable: what is gone through; None for a bar that is moved by hand.
        disable: show none.
        options: of tqdm.
    """
    return tqdm(iterable, leave=False, disable=disable or not speaks() or not _wanted.get(), **options)
