"""The schema of EasyEdit."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import (
    PARAPHRASES,
    TRUTHS,
    as_template,
    first_of,
    first_text,
    neighbors_of,
    text,
    texts,
)


class EasyEdit(FactFormat):
    """EasyEdit's schema: ``prompt``, ``subject``, ``target_new``, ``ground_truth`` and ``rephrase_prompt``.

    Neighbors come as ``locality_prompt`` and ``locality_ground_truth``, or in a nested ``locality``. KnowEdit and
    CKnowEdit have the same schema; their questions under ``portability`` are not read.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``prompt`` and ``target_new`` at the top level."""
        return "prompt" in record and "target_new" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record, whose prompt is either complete, with the subject in it, or a template."""
        subject, truth = text(record, "subject"), first_text(record, *TRUTHS)
        return Fact(
            subject=subject,
            prompt=as_template(text(record, "prompt", prompt=True), subject),
            target_new=first_of(record, "target_new"),
            target_true=truth,
            paraphrases=texts(record, *PARAPHRASES),
            neighbors=neighbors_of(record, truth),
            id=record.get("case_id", index),
        )
