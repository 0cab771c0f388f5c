"""Progress bars and messages of a run, which only rank 0 shows.

Importing this module imports neither torch nor Lightning, so that commands without a model start at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which launchers give a process its rank, in the order in which Lightning reads them."""

_wanted: ContextVar[bool] = ContextVar("_wanted", default=True)


def speaks() -> bool:
    """Return whether this process is rank 0, the one that writes messages.

    The rank is Lightning's if Lightning is imported, and otherwise the launcher's environment variable; the answer is
    also right before the process group exists.
    """
    lightning: Any = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None:
        return int(getattr(lightning.rank_zero_only, "rank", 0)) == 0
    given = [os.environ[name] for name in _RANK_VARIABLES if name in os.environ]
    return not given or given[0].strip() == "0"


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Show or hide all progress bars inside the ``with``: editlab's and those of transformers."""
    from transformers.utils import logging as transformers_logging

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
    """Return a progress bar that disappears when it is finished; it is shown on rank 0 only, and if bars are enabled.

    Args:
        iterable: items to iterate over; None for a bar that is moved by ``update``.
        disable: show no bar.
        options: further arguments of tqdm.
    """
    return tqdm(iterable, leave=False, disable=disable or not speaks() or not _wanted.get(), **options)
