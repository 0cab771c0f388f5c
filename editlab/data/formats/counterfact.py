"""The schema of CounterFact."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import field, text, texts


class CounterFact(FactFormat):
    """CounterFact and MultiCounterFact (Meng et al. 2022): ``requested_rewrite``, and lists of prompts."""

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``requested_rewrite``."""
        return "requested_rewrite" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; all fields except ``requested_rewrite`` may be absent, and so may ``target_true`` in it."""
        rewrite = field(record, "requested_rewrite", dict)
        true = rewrite.get("target_true")
        truth = text(true, "str") if true is not None else None
        neighbors = texts(record, "neighborhood_prompts")
        return Fact(
            subject=text(rewrite, "subject"),
            prompt=text(rewrite, "prompt", prompt=True),
            target_new=text(field(rewrite, "target_new", dict), "str"),
            target_true=truth,
            paraphrases=texts(record, "paraphrase_prompts"),
            neighbors=tuple(Neighbor(prompt, truth) for prompt in neighbors) if truth is not None else (),
            id=record.get("case_id", index),
        )
