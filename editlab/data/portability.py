"""How the questions of a fact are counted: most by themselves, the variants of a multi-hop question together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from editlab.data.fact import Fact, Question, composed

MULTI_HOP = "multi-hop"
"""Group of MQuAKE's multi-hop questions: the variants of one question, of which any may be answered."""
SINGLE_HOP = "single-hop"
"""Group of the questions for the single hops that MQuAKE's multi-hop question consists of."""
ANY_COUNTS = frozenset({MULTI_HOP})
"""Groups in which a fact counts as right where any one of its questions is answered."""


def cases(questions: Iterable[Question]) -> list[tuple[Question, ...]]:
    """Return the questions of one fact as cases; a case counts as right where any of its questions is answered.

    Questions of a group in :data:`ANY_COUNTS` that have the same answers are one case: MQuAKE words each multi-hop
    question in three ways, and its authors take a case for solved if the model answers one of them (Zhong et al. 2023).
    Every other question is a case of its own. Cases come in the order of their first question.

    >>> two = [Question("multi-hop", "Capital of its country?", ("Oslo",)),
    ...        Question("multi-hop", "Its country's capital is", ("Oslo",))]
    >>> [len(case) for case in cases([*two, Question("Reasoning", "Its king is", ("Harald V",))])]
    [2, 1]
    """
    found: dict[object, list[Question]] = {}
    for number, question in enumerate(questions):
        together = question.group in ANY_COUNTS
        found.setdefault((question.group, question.answers) if together else number, []).append(question)
    return [tuple(case) for case in found.values()]


def with_questions_of(fact: Fact, repeat: Fact) -> Fact:
    """Return a fact with the questions of a record that makes the same edit again, so that they are not lost with it.

    In MQuAKE many cases share an edit. A record with another target adds nothing, because its questions do not follow
    from the first edit.
    """
    new = [question for question in repeat.portability if question not in fact.portability]
    if not new or composed(fact.target_new) != composed(repeat.target_new):
        return fact
    return replace(fact, portability=(*fact.portability, *new))
