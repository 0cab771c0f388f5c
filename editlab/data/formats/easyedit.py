"""The schema of EasyEdit."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import PARAPHRASES, TRUTHS, first_of, first_text, neighbors_of, placed, texts
from editlab.data.formats.questions import aliases_of, questions_of


class EasyEdit(FactFormat):
    """EasyEdit's schema: ``prompt``, ``subject``, ``target_new``, ``ground_truth`` and ``rephrase_prompt``.

    Neighbors come as ``locality_prompt`` and ``locality_ground_truth``, or in a nested ``locality``; questions that
    follow from the edit come in a nested ``portability`` of named groups. KnowEdit (wiki_recent, wiki_counterfact and
    ZsRE; Zhang et al. 2024) and CKnowEdit have the same schema.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``prompt`` and ``target_new`` at the top level."""
        return "prompt" in record and "target_new" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record, whose prompt is either complete, with the subject in it, or a template."""
        (subject, prompt), truth = placed(record, "subject", "prompt"), first_text(record, *TRUTHS)
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=first_of(record, "target_new"),
            target_true=truth,
            paraphrases=texts(record, *PARAPHRASES),
            neighbors=neighbors_of(record, truth),
            id=record.get("case_id", index),
            aliases=aliases_of(record, ["target_new"], "aliases"),
            truth_aliases=aliases_of(record, TRUTHS, "truth_aliases"),
            portability=questions_of(record),
        )
