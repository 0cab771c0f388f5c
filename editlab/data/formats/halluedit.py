"""The schema of HalluEditBench."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from editlab.data.fact import Fact, Question
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import first_of, first_text, leave_out, neighbors_of, placed, text, texts
from editlab.data.formats.questions import aliases_of, asked, names_in

HOPS = range(2, 7)
"""Numbers of hops for which HalluEditBench has a question."""


class HalluEditBench(FactFormat):
    """HalluEditBench (Huang et al. 2025): tables of facts that a model hallucinates, with questions of many kinds.

    The new target is ``object``, which is right in the world, so a record has no true target to be replaced. All
    questions except the paraphrase are portability: ``yes``, ``no``, ``multiple_choice``, ``reversed_relation`` and
    ``2hop`` to ``6hop``. ``locality_question`` has no answer in the file (the benchmark compares the answers before and
    after an edit), so it is not read.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``question`` and ``object``."""
        return "question" in record and "object" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a row; all columns except ``subject``, ``question`` and ``object`` may be absent or empty."""
        subject, prompt = placed(record, "subject", "question")
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=first_of(record, "object"),
            paraphrases=texts(record, "paraphrased_question"),
            neighbors=neighbors_of(record, None),
            id=index,
            aliases=aliases_of(record, ["object"], "aliases"),
            portability=tuple(_questions(record)),
        )


def _questions(record: dict[str, Any]) -> Iterator[Question]:
    for group in ("yes", "no"):
        yield from (Question(group, one, (group.capitalize(),)) for one in texts(record, f"{group}_question"))
    for choices in texts(record, "multiple_choice_with_letters"):
        letters = names_in(record.get("multiple_choice_labels"), "multiple_choice_labels")
        if letters:
            yield Question("multiple_choice", f"{text(record, 'question')} {choices}", letters)
        else:
            leave_out(record, "multiple_choice_with_letters")
    subject = first_text(record, "subject")
    for one in texts(record, "reversed_relation_question") if subject else ():
        yield Question("reversed_relation", one, (str(subject),))
    for hops in HOPS:
        yield from asked(record, f"{hops}hop", f"question_{hops}hop", f"answer_{hops}hop")
