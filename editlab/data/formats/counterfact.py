"""The schema of CounterFact and MQuAKE."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, as_template, first_of, first_text, neighbors_of, text, texts
from editlab.errors import UserError


class CounterFact(FactFormat):
    """CounterFact and MultiCounterFact (Meng et al. 2022): ``requested_rewrite``, and lists of prompts.

    MQuAKE (Zhong et al. 2023) has a list of rewrites in each record, and each is a fact; its multi-hop questions are
    not read.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``requested_rewrite``."""
        return "requested_rewrite" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read the first rewrite of a record."""
        return self.read_all(record, index)[0]

    def read_all(self, record: dict[str, Any], index: int) -> list[Fact]:
        """Read a record; all fields except ``requested_rewrite`` may be absent, and so may ``target_true`` in it."""
        rewrites = record.get("requested_rewrite")
        name = record.get("case_id", index)
        if not isinstance(rewrites, list):
            return [_fact(record, rewrites, name)]
        if not rewrites:
            raise UserError("has an empty 'requested_rewrite': give at least one rewrite in it")
        if len(rewrites) == 1:
            return [_fact(record, rewrites[0], name)]
        return [_fact({}, rewrite, f"{name}.{number}") for number, rewrite in enumerate(rewrites, start=1)]


def _fact(record: dict[str, Any], rewrite: Any, name: int | str) -> Fact:
    if not isinstance(rewrite, dict):
        raise UserError("has a 'requested_rewrite' that is not an object: make it one with subject, prompt, target_new")
    subject, truth = text(rewrite, "subject"), first_text(rewrite, "target_true")
    return Fact(
        subject=subject,
        prompt=as_template(text(rewrite, "prompt", prompt=True), subject),
        target_new=first_of(rewrite, "target_new"),
        target_true=truth,
        paraphrases=(*texts(record, *PARAPHRASES), *texts(rewrite, "question")),
        neighbors=neighbors_of(record, truth),
        id=name,
    )
