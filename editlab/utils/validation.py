"""Checks of settings. Each raises one sentence that names the setting, its value, and what it must be.

``where`` is the section or class of the setting as a recipe writes it (``model.values``, ``LoRAAdjust``). None stands
for a setting that was not given, and passes. NaN and infinity pass no check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from editlab.errors import UserError


def at_least_one(where: str, **settings: float | None) -> None:
    """Check counts, which must be 1 or more.

    Raises:
        UserError: A setting is too small; the first one is named.
    """
    _check(where, settings, lambda value: value >= 1, "must be at least 1")


def above_zero(where: str, **settings: float | None) -> None:
    """Check rates, weights and sizes, which must be above 0.

    Raises:
        UserError: A setting is too small; the first one is named.
    """
    _check(where, settings, lambda value: value > 0, "must be above 0")


def not_negative(where: str, **settings: float | None) -> None:
    """Check amounts, which must be 0 or more.

    Raises:
        UserError: A setting is negative; the first one is named.
    """
    _check(where, settings, lambda value: value >= 0, "must not be negative")


def shares(where: str, **settings: float | None) -> None:
    """Check fractions, which must lie between 0 and 1, both included.

    Raises:
        UserError: A setting is outside; the first one is named.
    """
    _check(where, settings, lambda value: 0 <= value <= 1, "must lie between 0 and 1")


def decays(where: str, **settings: float | None) -> None:
    """Check factors of a repeated multiplication, which must be above 0 and at most 1 (1: no decay).

    Raises:
        UserError: A setting is outside; the first one is named.
    """
    _check(where, settings, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def one_of(where: str, known: Collection[str], **settings: str) -> None:
    """Check names, which must be in ``known``.

    Raises:
        UserError: A name is unknown; the first one is named.
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
