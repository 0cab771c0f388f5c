"""How the questions of a fact are counted: most by themselves, the variants of a multi-hop question together."""

from __future__ import annotations

from collections.abc import Iterable

from editlab.data.fact import Question

MULTI_HOP = "multi-hop"
"""Group of MQuAKE's multi-hop questions: the variants of one question, of which any may be answered."""
SINGLE_HOP = "single-hop"
"""Group of the questions for the single hops that MQuAKE's multi-hop question consists of."""
ANY_COUNTS = frozenset({MULTI_HOP})
"""Groups in which a fact counts as right where any one of its questions is answered."""


def cases(questions: Iterable[Question]) -> list[tuple[Question, ...]]:
    """Return the questions of one fact as cases; a case counts as right where any of its questions is answered.

    All questions of a group in :data:`ANY_COUNTS` are one case: MQuAKE words each multi-hop question in three ways, and
    its authors take a case for solved if the model answers one of them (Zhong et al. 2023). Every other question is a
    case of its own. Cases come in the order of their first question.

    >>> two = [Question("multi-hop", "Capital of its country?", ("Oslo",)),
    ...        Question("multi-hop", "Its country's capital is", ("Oslo",))]
    >>> [len(case) for case in cases([*two, Question("Reasoning", "Its king is", ("Harald V",))])]
    [2, 1]
    """
    found: dict[str | int, list[Question]] = {}
    for number, question in enumerate(questions):
        found.setdefault(question.group if question.group in ANY_COUNTS else number, []).append(question)
    return [tuple(case) for case in found.values()]
