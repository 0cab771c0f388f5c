"""The schema of zsRE."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import as_template, text, texts, trimmed_prompt


class ZsRE(FactFormat):
    """zsRE in MEND's schema: ``src``, ``rephrase``, ``alt`` (the new target), ``answers``, ``loc``, ``loc_ans``."""

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``src`` and ``alt``."""
        return "src" in record and "alt" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; its neighbor is the unrelated question ``loc``, without MEND's marker before it."""
        subject = text(record, "subject")
        answers = texts(record, "answers")
        loc = trimmed_prompt(str(record.get("loc") or "").removeprefix("nq question: "))
        return Fact(
            subject=subject,
            prompt=as_template(text(record, "src", prompt=True), subject),
            target_new=text(record, "alt"),
            target_true=answers[0].strip() if answers else None,
            paraphrases=texts(record, "rephrase"),
            neighbors=(Neighbor(loc, text(record, "loc_ans")),) if loc else (),
            id=record.get("case_id", index),
        )
