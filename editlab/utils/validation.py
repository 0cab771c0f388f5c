"""What settings may be. Each check raises one sentence that names the setting, what it is, and what it must be.

``where`` is what a setting belongs to, as it stands in a recipe (``model.values``, ``LoRAAdjust``). A setting that is
None is not given, and is not looked at. Not-a-number is in no range, and infinity in none either: what is multiplied by
it is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from editlab.errors import UserError


def at_least_one(where: str, **settings: float | None) -> None:
    """Counts: 1 or more.

    Raises:
        UserError: for the first that is not.
    """
    _check(where, settings, lambda value: value >= 1, "must be at least 1")


def above_zero(where: str, **settings: float | None) -> None:
    """Rates, weights and sizes: more than 0.

    Raises:
        UserError: for the first that is not.
    """
    _check(where, settings, lambda value: value > 0, "must be above 0")


def not_negative(where: str, **settings: float | None) -> None:
    """What may be 0, which is none of it.

    Raises:
        UserError: for the first that is negative.
    """
    _check(where, settings, lambda value: value >= 0, "must not be negative")


def shares(where: str, **settings: float | None) -> None:
    """Parts of a whole: 0, 1, or between.

    Raises:
        UserError: for the first that is outside.
    """
    _check(where, settings, lambda value: 0 <= value <= 1, "must lie between 0 and 1")


def decays(where: str, **settings: float | None) -> None:
    """What something is multiplied by again and again: above 0, and 1 where it stays.

    Raises:
        UserError: for the first that is outside.
    """
    _check(where, settings, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def one_of(where: str, known: Collection[str], **settings: str) -> None:
    """Names of a fixed list.

    Raises:
        UserError: for the first that is not on it.
    """
    for name, value in settings.items():
        if value not in known:
            raise UserError(f"{where}.{name} is {value!r}: it must be one of {', '.join(known)}.")


def _check(where: str, settings: dict[str, float | None], holds: Callable[[float], bool], what: str) -> None:
    for name, value in settings.items():
        if value is not None and not holds(value):
            raise UserError(f"{where}.{name} is {value}: it {what}.")
        if value == math.inf:
            raise UserError(f"{where}.{name} is {value}: it must be finite.")
