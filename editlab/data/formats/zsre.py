"""The schema of zsRE."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, as_template, first_of, first_text, neighbors_of, text, texts


class ZsRE(FactFormat):
    """zsRE in MEND's schema: ``src``, ``rephrase``, ``alt`` (the new target), ``answers``, ``loc``, ``loc_ans``."""

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``src`` and ``alt``."""
        return "src" in record and "alt" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; its neighbor is the unrelated question ``loc``, without MEND's marker before it."""
        subject, truth = text(record, "subject"), first_text(record, "answers")
        return Fact(
            subject=subject,
            prompt=as_template(text(record, "src", prompt=True), subject),
            target_new=first_of(record, "alt"),
            target_true=truth,
            paraphrases=texts(record, *PARAPHRASES),
            neighbors=neighbors_of(record, truth),
            id=record.get("case_id", index),
        )
