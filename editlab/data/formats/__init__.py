"""Schemas of fact files, one module each: those of published data sets, and a plain schema for users' own facts."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.checks import checked
from editlab.data.formats.columns import check_columns, format_by
from editlab.data.formats.counterfact import CounterFact
from editlab.data.formats.easyedit import EasyEdit
from editlab.data.formats.evoke import EVOKE
from editlab.data.formats.fields import as_template
from editlab.data.formats.halluedit import HalluEditBench
from editlab.data.formats.mquake import MQuAKE
from editlab.data.formats.plain import Plain, WikiBio
from editlab.data.formats.record import Record, UnreadFields
from editlab.data.formats.rippleedits import RippleEdits
from editlab.data.formats.subjects import FIELD, INFER, LAST_TOKEN, SUBJECTS, Subjects
from editlab.data.formats.ultraeditbench import UltraEditBench
from editlab.data.formats.wikibigedit import WikiBigEdit
from editlab.data.formats.zsre import ZsRE
from editlab.errors import UserError

__all__ = [
    "EVOKE",
    "FIELD",
    "FORMATS",
    "INFER",
    "LAST_TOKEN",
    "SUBJECTS",
    "CounterFact",
    "EasyEdit",
    "FactFormat",
    "HalluEditBench",
    "MQuAKE",
    "Plain",
    "Record",
    "RippleEdits",
    "Subjects",
    "UltraEditBench",
    "UnreadFields",
    "WikiBigEdit",
    "WikiBio",
    "ZsRE",
    "as_template",
    "check_columns",
    "checked",
    "format_by",
    "format_of",
    "other_format",
    "read_all",
    "read_record",
]

FORMATS: tuple[FactFormat, ...] = (
    RippleEdits(),
    MQuAKE(),
    EVOKE(),
    CounterFact(),
    ZsRE(),
    EasyEdit(),
    Plain(),
    UltraEditBench(),
    WikiBigEdit(),
    HalluEditBench(),
    WikiBio(),
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
        "subject, prompt and target, or say by data.columns which of its fields these are"
    )


def other_format(record: dict[str, Any], fact_format: FactFormat) -> FactFormat | None:
    """Return the schema of a record that is not of the schema of its file; None if it has no other schema either."""
    if fact_format.matches(record):
        return None
    return next((one for one in FORMATS if one.matches(record)), None)


def read_record(record: dict[str, Any], index: int, fact_format: FactFormat | None = None) -> Fact:
    """Return the fact of one record, which has the schema ``fact_format`` (default: that of :func:`format_of`).

    Raises:
        UserError: A field is missing or wrong; the message is a predicate (see :class:`FactFormat`).
    """
    return checked((fact_format or format_of(record)).read(Record(record), index))


def read_all(
    record: Record, index: int, fact_format: FactFormat | None = None, subjects: Subjects | None = None
) -> list[Fact]:
    """Return all facts of one record, which notes the fields that are read.

    Args:
        record: the record; :meth:`Subjects.record` makes one from its fields.
        index: number of the record, its id unless it has one.
        fact_format: its schema; default: that of :func:`format_of`.
        subjects: what gives the facts their subjects; default: each record must name its own.

    Raises:
        UserError: A field is missing or wrong; the message is a predicate (see :class:`FactFormat`).
    """
    subjects = subjects or Subjects()
    return [subjects.settle(fact) for fact in (fact_format or format_of(record)).read_all(record, index)]
