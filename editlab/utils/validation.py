"""Checks of settings; each raises an error that names the setting, its value, and the allowed range.

``where`` is the section or class of the setting as a recipe writes it (``model.values``, ``LoRAAdjust``). A setting
that was not given is None and is always valid. NaN and infinity are never valid.
"""

from __future__ import annotations

import math
import sys
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


def fractions(where: str, **settings: float | None) -> None:
    """Check fractions, which must lie between 0 and 1, both included.

    Raises:
        UserError: A setting is out of range; the first one is named.
    """
    _check(where, settings, lambda value: 0 <= value <= 1, "must lie between 0 and 1")


def decays(where: str, **settings: float | None) -> None:
    """Check decay factors, which must be above 0 and at most 1 (1 means no decay).

    Raises:
        UserError: A setting is out of range; the first one is named.
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
        if isinstance(value, int) and value > sys.maxsize:
            raise UserError(f"{where}.{name} has {value.bit_length()} bits: it must be at most {sys.maxsize}.")
