"""The plain schema, for a user's own facts."""

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


class Plain(FactFormat):
    """Schema of users' own facts: ``subject``, ``prompt`` and ``target``, or fields with the names that are given.

    The fields ``truth``, ``paraphrases`` and ``neighbors`` are optional. Paraphrases are a text or a list of texts,
    neighbors a list of objects with ``prompt`` and ``truth``. In a cell of a CSV file, lists are written as JSON.

    Args:
        subject: name of the field with the subject.
        prompt: name of the field with the prompt, which is either complete or a template.
        target: name of the field with the new target.
        truth: name of the field with the true target.
        paraphrases: name of the field with the paraphrases.
        neighbors: name of the field with the neighbors.
    """

    def __init__(
        self,
        subject: str = "subject",
        prompt: str = "prompt",
        target: str = "target",
        truth: str = "truth",
        paraphrases: str = "paraphrases",
        neighbors: str = "neighbors",
    ) -> None:
        self.subject, self.prompt, self.target = subject, prompt, target
        self.truth, self.paraphrases, self.neighbors = truth, paraphrases, neighbors

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has the fields of subject, prompt and target."""
        return {self.subject, self.prompt, self.target} <= record.keys()

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; an empty cell counts as an absent field."""
        subject = text(record, self.subject)
        truth = first_text(record, *dict.fromkeys((self.truth, *TRUTHS)))
        return Fact(
            subject=subject,
            prompt=as_template(text(record, self.prompt, prompt=True), subject),
            target_new=first_of(record, self.target),
            target_true=truth,
            paraphrases=texts(record, *dict.fromkeys((self.paraphrases, *PARAPHRASES))),
            neighbors=neighbors_of(record, truth, self.neighbors),
            id=record.get("id") or index,
        )
