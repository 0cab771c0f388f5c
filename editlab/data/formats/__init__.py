"""Schemas of fact files, one module each: CounterFact, EasyEdit, zsRE and a plain schema for users' own facts."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.counterfact import CounterFact
from editlab.data.formats.easyedit import EasyEdit
from editlab.data.formats.fields import as_template, checked
from editlab.data.formats.plain import Plain
from editlab.data.formats.record import Record, UnreadFields
from editlab.data.formats.zsre import ZsRE
from editlab.errors import UserError

__all__ = [
    "FORMATS",
    "CounterFact",
    "EasyEdit",
    "FactFormat",
    "Plain",
    "Record",
    "UnreadFields",
    "ZsRE",
    "as_template",
    "checked",
    "format_of",
    "read_all",
    "read_record",
]

FORMATS: tuple[FactFormat, ...] = (
    CounterFact(),
    ZsRE(),
    EasyEdit(),
    Plain(),
    Plain(subject="concept", prompt="text", target="labels"),  # WikiBio
)
"""The schemas that :func:`format_of` tries, in this order."""


def format_of(record: dict[str, Any]) -> FactFormat:
    """Return the first of :data:`FORMATS` that a record matches.

    Raises:
        UserError: It matches none; the message is a predicate (see :class:`FactFormat`).
    """
    for fact_format in FORMATS:
        if fact_format.matches(record):
            return fact_format
    known = ", ".join(dict.fromkeys(type(f).__name__ for f in FORMATS))
    raise UserError(
        f"has the fields {', '.join(sorted(map(str, record))) or 'none'}, which no format has ({known}): give it "
        "subject, prompt and target, or name the fields by data.format Plain and its data.format.subject and so on"
    )


def read_record(record: dict[str, Any], index: int, fact_format: FactFormat | None = None) -> Fact:
    """Return the fact of one record, which has the schema ``fact_format`` (default: that of :func:`format_of`).

    Raises:
        UserError: A field is missing or wrong; the message is a predicate (see :class:`FactFormat`).
    """
    return checked((fact_format or format_of(record)).read(Record(record), index))


def read_all(record: Record, index: int, fact_format: FactFormat | None = None) -> list[Fact]:
    """Return all facts of one record, which notes the fields that are read; the rest is as for :func:`read_record`."""
    return [checked(fact) for fact in (fact_format or format_of(record)).read_all(record, index)]
