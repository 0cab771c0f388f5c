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

    While a run's own bar is on the screen (:func:`within`), the new one is shown as words in that line.

    Args:
        iterable: items to iterate over; None for a bar that is moved by ``update``.
        disable: show no bar.
        options: further arguments of tqdm.
    """
    hidden = disable or not speaks() or not _wanted.get()
    if _line and not hidden:
        return _Words(_line[-1], iterable, **options)
    return tqdm(iterable, leave=False, disable=hidden, **options)


_line: list[tqdm] = []
"""The run's own bar while it is on the screen, in a list of at most one."""


def within(bar: tqdm | None) -> None:
    """Show later bars as words in the line of ``bar``; None shows them as bars of their own again."""
    _line[:] = [] if bar is None else [bar]


class _Words(tqdm):
    """A progress bar that is shown as words, such as ``values 5/16``, before another bar.

    Args:
        line: the other bar.
        iterable: items to iterate over, or None.
        options: further arguments of tqdm.
    """

    def __init__(self, line: tqdm, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        self._bar, self._title = line, line.desc
        self._words = str(options.get("desc") or "").lower()
        super().__init__(iterable, disable=True, **options)
        self.n = 0
        self._show()

    def _show(self) -> None:
        of = "" if self.total is None else f"/{self.total}"
        self._bar.set_description_str(f"{self._words} {self.n}{of}" if self._words else self._title)

    def __iter__(self) -> Iterator[Any]:
        for one in self.iterable:
            yield one
            self.update()
        self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more items."""
        self.n += int(n or 0)
        self._show()
        return None

    def close(self) -> None:
        """Remove the words."""
        if self._bar.desc != self._title:
            self._bar.set_description_str(self._title)
