"""The schema of UltraEditBench."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, first_of, neighbors_of, placed, texts
from editlab.data.formats.questions import aliases_of


class UltraEditBench(FactFormat):
    """UltraEditBench (Gu et al. 2025): ``prompt``, ``ans``, ``rephrase_prompt``, ``loc`` and ``loc_ans``.

    A record has no true target.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``prompt`` and ``ans``."""
        return "prompt" in record and "ans" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; ``rephrase_prompt`` and ``loc`` may be absent."""
        subject, prompt = placed(record, "subject", "prompt")
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=first_of(record, "ans"),
            paraphrases=texts(record, *PARAPHRASES),
            neighbors=neighbors_of(record, None),
            id=record.get("case_id", index),
            aliases=aliases_of(record, ["ans"], "aliases"),
        )
