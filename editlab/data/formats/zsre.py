"""The schema of zsRE."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, first_of, first_text, neighbors_of, placed, texts
from editlab.data.formats.questions import aliases_of, questions_of


class ZsRE(FactFormat):
    """zsRE in MEND's schema: ``src``, ``rephrase``, ``alt`` (the new target), ``answers``, ``loc``, ``loc_ans``.

    Where ``portability`` was added (Yao et al. 2023), its question is read.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``src`` and ``alt``."""
        return "src" in record and "alt" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; its neighbor is the unrelated question ``loc``, without MEND's marker before it."""
        (subject, prompt), truth = placed(record, "subject", "src"), first_text(record, "answers")
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=first_of(record, "alt"),
            target_true=truth,
            paraphrases=texts(record, *PARAPHRASES),
            neighbors=neighbors_of(record, truth),
            id=record.get("case_id", index),
            aliases=aliases_of(record, ["alt"], "aliases"),
            truth_aliases=aliases_of(record, ["answers"], "truth_aliases"),
            portability=questions_of(record),
        )
