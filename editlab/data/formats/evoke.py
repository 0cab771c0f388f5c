"""The schema of EVOKE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from editlab.data.fact import Fact, Neighbor
from editlab.data.formats.counterfact import CounterFact
from editlab.data.formats.fields import field, text, texts
from editlab.data.formats.questions import names_in
from editlab.errors import UserError


class EVOKE(CounterFact):
    """EVOKE (Zhang et al. 2025), which adds to CounterFact where an edited model overfits to the new target.

    ``prefix_distraction`` are prompts after the edited fact whose answer is still the record's truth, and
    ``subject_specificity`` asks for another relation of the subject; both are read as neighbors. ``portability`` has
    one question that follows from the edit.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether the record has ``requested_rewrite`` and one of the two fields that EVOKE adds."""
        return super().matches(record) and not record.keys().isdisjoint({"prefix_distraction", "subject_specificity"})

    def read_all(self, record: dict[str, Any], index: int) -> list[Fact]:
        """Read a record; all fields except ``requested_rewrite`` may be absent."""
        return [
            replace(fact, neighbors=(*fact.neighbors, *_more(record, fact))) for fact in super().read_all(record, index)
        ]


def _more(record: dict[str, Any], fact: Fact) -> list[Neighbor]:
    distracted = texts(record, "prefix_distraction")
    if distracted and fact.target_true is None:
        raise UserError("has 'prefix_distraction' but no 'target_true', which is their answer: add it")
    found = [Neighbor(prompt, str(fact.target_true)) for prompt in distracted]
    if record.get("subject_specificity"):
        other = field(record, "subject_specificity", dict)
        names = names_in(other.get("answer"), "answer")
        if not names:
            raise UserError("has a 'subject_specificity' without an answer: add it")
        found.append(Neighbor(text(other, "prompt", prompt=True), names[0]))
    return found
