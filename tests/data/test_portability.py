"""Tests of how the questions of a fact are counted."""

from editlab.data.fact import Question
from editlab.data.portability import MULTI_HOP, cases


def test_variants_of_a_multi_hop_question_are_one_case():
    def one(group, prompt):
        return Question(group, prompt, ("a",))

    first, second, third = (one(MULTI_HOP, prompt) for prompt in ("p", "q", "r"))
    other, again = one("Subject_Aliasing", "p"), one("Subject_Aliasing", "q")
    assert cases([other, first, second, again, third]) == [(other,), (first, second, third), (again,)]
    assert cases([]) == []
