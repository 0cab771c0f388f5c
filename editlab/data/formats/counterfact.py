"""The schema of CounterFact."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, first_of, first_text, neighbors_of, placed, texts
from editlab.data.formats.questions import aliases_of, questions_of
from editlab.errors import UserError


class CounterFact(FactFormat):
    """CounterFact and MultiCounterFact (Meng et al. 2022): ``requested_rewrite``, and lists of prompts.

    A list of rewrites in one record (as in MQuAKE) is a list of facts, all with the record's id. Where ``portability``
    was added (Yao et al. 2023), its question is read.
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
        return [_fact({}, rewrite, name) for rewrite in rewrites]


def _fact(record: dict[str, Any], rewrite: Any, name: int | str) -> Fact:
    if not isinstance(rewrite, dict):
        raise UserError("has a 'requested_rewrite' that is not an object: make it one with subject, prompt, target_new")
    (subject, prompt), truth = placed(rewrite, "subject", "prompt"), first_text(rewrite, "target_true")
    return Fact(
        subject=subject,
        prompt=prompt,
        target_new=first_of(rewrite, "target_new"),
        target_true=truth,
        paraphrases=(*texts(record, *PARAPHRASES), *texts(rewrite, "question")),
        neighbors=neighbors_of(record, truth),
        id=name,
        aliases=aliases_of(rewrite, ["target_new"], "aliases"),
        truth_aliases=aliases_of(rewrite, ["target_true"], "truth_aliases"),
        portability=questions_of(record),
    )
