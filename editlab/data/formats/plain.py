"""The plain schema, for a user's own facts."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import as_template, text, texts, unpacked
from editlab.errors import UserError


class Plain(FactFormat):
    """Schema of users' own facts: ``subject``, ``prompt`` and ``target``.

    The fields ``truth``, ``paraphrases`` and ``neighbors`` are optional. Paraphrases are a text or a list of texts,
    neighbors a list of objects with ``prompt`` and ``truth``. In a cell of a CSV file, lists are written as JSON.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``subject``, ``prompt`` and ``target``."""
        return {"subject", "prompt", "target"} <= record.keys()

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record, whose prompt is either complete or a template; an empty cell counts as an absent field."""
        subject = text(record, "subject")
        truth = None if record.get("truth") == "" else record.get("truth")
        neighbors = unpacked(record, "neighbors") or []
        if not isinstance(neighbors, list):
            raise UserError('has \'neighbors\' that are not a list: write [{"prompt": "...", "truth": "..."}]')
        return Fact(
            subject=subject,
            prompt=as_template(text(record, "prompt", prompt=True), subject),
            target_new=text(record, "target"),
            target_true=text(record, "truth") if truth is not None else None,
            paraphrases=texts({"paraphrases": unpacked(record, "paraphrases")}, "paraphrases"),
            neighbors=tuple(Neighbor(text(one, "prompt", prompt=True), text(one, "truth")) for one in neighbors),
            id=record.get("id") or index,
        )
