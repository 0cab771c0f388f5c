"""The schema of MQuAKE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from editlab.data.fact import Fact
from editlab.data.formats.counterfact import CounterFact
from editlab.data.formats.fields import first_of, texts
from editlab.data.formats.questions import asked, names_in
from editlab.data.portability import MULTI_HOP, SINGLE_HOP, Question
from editlab.errors import UserError


class MQuAKE(CounterFact):
    """MQuAKE-CF and MQuAKE-T (Zhong et al. 2023): a case of one or several edits, and multi-hop questions about them.

    Each rewrite is a fact, and all facts of a case have its ``case_id``. The last of them has the questions, because
    their answers follow only when all edits of the case are made: the variants of the multi-hop question
    (:data:`~editlab.data.portability.MULTI_HOP`, of which any may be answered) and the questions of the single hops
    after the edits. The names of a target are those of the hop that asks for it.
    """

    def matches(self, record: dict[str, Any]) -> bool:
        """Return whether ``requested_rewrite`` is a list, or the record has ``questions`` too."""
        rewrites = record.get("requested_rewrite")
        return isinstance(rewrites, list) or (rewrites is not None and "questions" in record)

    def read_all(self, record: dict[str, Any], index: int) -> list[Fact]:
        """Read the facts of a case; all fields except ``requested_rewrite`` may be absent."""
        facts = super().read_all(record, index)
        new, old = _hops(record, "new_single_hops"), _hops(record, "single_hops")
        facts = [
            replace(
                fact,
                aliases=_aliases(fact, fact.target_new, new) or fact.aliases,
                truth_aliases=_aliases(fact, fact.target_true, old) or fact.truth_aliases,
            )
            for fact in facts
        ]
        questions = (*facts[-1].portability, *_multi_hop(record), *_single_hops(new))
        return [*facts[:-1], replace(facts[-1], portability=questions)]


def _hops(record: dict[str, Any], name: str) -> Sequence[dict[str, Any]]:
    found = record.get(name) or []
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise UserError(f"has {name!r} that are not a list of objects: give each question, cloze and answer")
    return found


def _multi_hop(record: dict[str, Any]) -> Iterator[Question]:
    questions = texts(record, "questions")
    if questions:
        first_of(record, "new_answer")  # without an answer no case can be solved
        aliases = names_in(record.get("new_answer_alias"), "new_answer_alias")
        answers = tuple(dict.fromkeys((*names_in(record["new_answer"], "new_answer"), *aliases)))
        yield from (Question(MULTI_HOP, question, answers) for question in questions)


def _single_hops(hops: Sequence[dict[str, Any]]) -> Iterator[Question]:
    for hop in hops:
        yield from asked(hop, SINGLE_HOP, "question", "answer", ["answer_alias"])


def _aliases(fact: Fact, target: str | None, hops: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the other names of a target, which the hop that asks for the fact has."""
    for hop in hops:
        names = names_in([hop.get("answer"), hop.get("answer_alias")], "answer_alias")
        asks = hop.get("cloze") == fact.question or hop.get("question") in fact.paraphrases
        if asks and target in names[:1]:
            return names[1:]
    return ()
