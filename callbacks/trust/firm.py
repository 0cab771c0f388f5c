"""The search for the least firm update of a batch that does no more harm than it may: trust as a trust region.

A firm solve holds an update back (:func:`editlab.solver.closed_form.solve`). Firmness moves on levels, as the damping
of Levenberg and Marquardt does: level 0 is the plain solve, and each further level doubles the firmness. The level that
a batch needed is where the next batch starts.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

LEVELS = 17
"""The firmest level, at which the update for one fact is a thousandth of the plain one."""
FIRST = 2.0**-6
"""Firmness of level 1: a fraction of the mean diagonal of the Gram matrix."""


class Finding(IntEnum):
    """What measuring a batch at one level showed."""

    TOO_FIRM = -1
    """no firmer update can help, as the edits themselves are learnt too little"""
    GOOD = 0
    """nothing speaks against the update"""
    TOO_LOOSE = 1
    """the update does more harm than it may"""


def firmness(level: int) -> float:
    """The firmness of a level, 0 to :data:`LEVELS`.

    >>> [firmness(level) for level in (0, 1, 2, 7)]
    [0.0, 0.015625, 0.03125, 1.0]
    """
    return FIRST * 2.0 ** (level - 1) if level else 0.0


def least_firm(start: int, measure: Callable[[int], Finding]) -> int | None:
    """The lowest level that is good, if harm falls and nothing is learnt better as the level rises.

    It begins at ``start`` and moves in steps of 1, 2, 4 and so on, to looser levels while they are good and to firmer
    ones while they are too loose; then it halves the interval in between. If neither is monotone, the result is still
    a level that was measured and found good.

    Args:
        start: the level to measure first.
        measure: what a level shows.

    Returns:
        The level; None if none was found to be good.
    """
    loose, firm, best = -1, LEVELS + 1, None  # up to ``loose`` all are too loose, from ``firm`` on none is
    level, step = start, 1
    while True:
        finding = measure(level)
        if finding is Finding.TOO_LOOSE:
            loose = level
        else:
            firm = level
            best = level if finding is Finding.GOOD else best
        if loose + 1 >= firm:
            return best
        if loose == -1:
            level = max(0, firm - step)
        elif firm == LEVELS + 1:
            level = min(LEVELS, loose + step)
        else:
            level = (loose + firm) // 2
        step *= 2
