"""What a run shows while it goes on: of several ranks one speaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


def speaks() -> bool:
    """Whether this process is rank 0, as its launcher has it: also before the ranks have found each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


def progress(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> tqdm:
    """A bar that goes when it is done, on rank 0; the others count in silence.

    Args:
        iterable: what is gone through; None for a bar that is moved by hand.
        disable: show none.
        options: of tqdm.
    """
    return tqdm(iterable, leave=False, disable=disable or not speaks(), **options)
