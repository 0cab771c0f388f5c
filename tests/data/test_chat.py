"""Tests that all prompts of a fact go through a chat template, and come back."""

from __future__ import annotations

import pytest

from editlab.data.chat import as_edited, as_evaluated
from editlab.data.fact import Fact, Neighbor, Question
from editlab.lm.chat import Chat

FACT = Fact(
    "Oslo", "{} lies in", "Peru", "Norway", ("The land of Oslo is",), (Neighbor("Lima lies in", "Peru"),), 3,
    portability=(Question("two hops", "In Oslo one speaks", ("Spanish",)),),
)  # fmt: skip


def chat(mode):
    return Chat("<s>[user] ", "\n[assistant]\n", mode)


def templated(fact):
    texts = (fact.question, *fact.paraphrases, *(n.prompt for n in fact.neighbors), fact.portability[0].prompt)
    return {(text.startswith("<s>[user] "), text.endswith("\n[assistant]\n")) for text in texts}


@pytest.mark.parametrize(
    ("mode", "edited", "evaluated"),
    [("edit", True, False), ("evaluate", False, True), ("both", True, True)],
)
def test_each_mode_wraps_all_prompts_where_it_says(mode, edited, evaluated):
    (at_edit,) = as_edited([FACT], chat(mode))
    (at_evaluation,) = as_evaluated([at_edit], chat(mode))
    assert templated(at_edit) == {(edited, edited)}
    assert templated(at_evaluation) == {(evaluated, evaluated)}
    assert FACT in (at_edit, at_evaluation) or mode == "both"
    start, end = at_edit.subject_span
    assert at_edit.question[start:end] == "Oslo"
    assert at_edit.neighbors[0].truth == "Peru"


def test_without_a_chat_facts_are_unchanged():
    assert as_edited([FACT], None) == as_evaluated([FACT], None) == [FACT]
