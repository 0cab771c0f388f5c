"""The schema of WikiBigEdit."""

from __future__ import annotations

from typing import Any

from editlab.data.fact import Fact, Question
from editlab.data.formats.base import FactFormat
from editlab.data.formats.fields import first_of, neighbors_of, placed, texts
from editlab.data.formats.questions import aliases_of, asked


class WikiBigEdit(FactFormat):
    """WikiBigEdit (Thede et al. 2025): changes of Wikidata as questions (``update``) and answers (``ans``).

    The question in the words of a persona and the two-hop question (``mhop``) are portability, ``loc`` is a neighbor. A
    record has no true target.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``update`` and ``ans``."""
        return "update" in record and "ans" in record

    def read(self, record: dict[str, Any], index: int) -> Fact:
        """Read a record; ``rephrase``, ``personas``, ``loc`` and ``mhop`` may be absent or null."""
        subject, prompt = placed(record, "subject", "update")
        target, aliases = first_of(record, "ans"), aliases_of(record, ["ans"], "aliases")
        return Fact(
            subject=subject,
            prompt=prompt,
            target_new=target,
            paraphrases=texts(record, "rephrase"),
            neighbors=neighbors_of(record, None),
            id=index,
            aliases=aliases,
            portability=(
                *(Question("personas", one, (target, *aliases)) for one in texts(record, "personas")),
                *asked(record, "mhop", "mhop", "mhop_ans"),
            ),
        )
