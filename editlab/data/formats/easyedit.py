"""The schema of EasyEdit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import as_template, field, first_text, paired, text, texts
from editlab.errors import UserError


class EasyEdit(FactFormat):
    """EasyEdit's schema: ``prompt``, ``subject``, ``target_new``, ``ground_truth`` and ``rephrase_prompt``.

    Neighbors come as ``locality_prompt`` and ``locality_ground_truth``, or in a nested ``locality``.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``prompt`` and ``target_new`` at the top level."""
        return "prompt" in record and "target_new" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record, whose prompt is either complete, with the subject in it, or a template."""
        subject = text(record, "subject")
        return Fact(
            subject=subject,
            prompt=as_template(text(record, "prompt", prompt=True), subject),
            target_new=text(record, "target_new"),
            target_true=first_text(record, "ground_truth"),
            paraphrases=texts(record, "rephrase_prompt"),
            neighbors=tuple(_neighbors(record)),
            id=record.get("case_id", index),
        )


def _neighbors(record: dict[str, Any]) -> Iterable[Neighbor]:
    if record.get("locality_prompt"):
        yield from paired(record, "locality_prompt", "locality_ground_truth")
    for group in (field(record, "locality", dict) if record.get("locality") else {}).values():
        for one in group if isinstance(group, list) else [group]:
            if not isinstance(one, dict):
                raise UserError("has a 'locality' with a part that is not an object: give it prompt and ground_truth")
            yield from paired(one, "prompt", "ground_truth")
