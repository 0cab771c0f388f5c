"""Tests of how the questions of a fact are counted."""

import json

from editlab.data import EditDataModule
from editlab.data.fact import Question
from editlab.data.portability import MULTI_HOP, cases, with_questions_of


def test_variants_of_a_multi_hop_question_are_one_case():
    def one(group, prompt):
        return Question(group, prompt, ("a",))

    first, second, third = (one(MULTI_HOP, prompt) for prompt in ("p", "q", "r"))
    other, again = one("Subject_Aliasing", "p"), one("Subject_Aliasing", "q")
    assert cases([other, first, second, again, third]) == [(other,), (first, second, third), (again,)]
    assert cases([]) == []
    two = Question(MULTI_HOP, "s", ("b",))  # of another case: its answers differ
    assert cases([first, two, second]) == [(first, second), (two,)]


def test_the_questions_of_a_repeated_edit_are_kept(tmp_path):
    """The second case makes the edit of the first again, and the third edits the same prompt to another target."""

    def case(target, question, answer):
        rewrite = {"subject": "Oslo", "prompt": "{} lies in", "target_new": {"str": target}}
        return {"requested_rewrite": [rewrite], "questions": [question], "new_answer": answer}

    path = tmp_path / "facts.json"
    path.write_text(json.dumps([case("Peru", "p", "a"), case("Peru", "q", "b"), case("Chile", "r", "c")]))
    data = EditDataModule(str(path), shuffle=False)
    data.setup()
    (fact,) = data.candidates
    assert (fact.target_new, fact.id) == ("Peru", 0)
    assert [(one.prompt, one.answers) for one in fact.portability] == [("p", ("a",)), ("q", ("b",))]
    assert with_questions_of(fact, fact) is fact
