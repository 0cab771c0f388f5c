"""Tests that neighbors about edited subjects are left out, against cases judged by hand and a search by regex."""

from __future__ import annotations

import re

import pytest

from editlab.data.fact import Fact, Neighbor
from editlab.data.neighbors import without_edited_neighbors


def fact(subject, *neighbors, prompt="The capital of {} is"):
    return Fact(subject, prompt, "Rome", neighbors=tuple(Neighbor(text, "Lima") for text in neighbors))


@pytest.mark.parametrize(
    ("neighbor", "stays"),
    [
        ("The capital of Japan is", False),  # an edited question
        ("The capital of Peru is", True),
        ("The seat of Japan is", False),  # in other words: the whole prompt is searched
        ("The seat of Japanese rule is", True),  # no whole word
        ("The seat of japan is", True),  # another case
        ("The capital of New Japan is", False),  # its own subject contains an edited one
        ("The capital of Guinea-Bissau, in Africa, is", False),
        ("The capital of Guinea Bissau is", True),  # the hyphen belongs to the subject
        ("The population of France is", True),  # the fact's own subject: another property, asked on purpose
        ("The capital of France is", False),  # the edited question itself
        ("St. Gallen is in", False),
        ("St Gallen is in", True),
        ("\u6771\u4eac\u306f", False),  # no spaces between words
        ("Co\u0302te is", False),  # an accent as a character of its own
    ],
)
def test_neighbors_about_edited_subjects_are_left_out(neighbor, stays):
    edited = [
        fact("France", neighbor), fact("Japan"), fact("Guinea-Bissau"), fact("St. Gallen"), fact("\u6771\u4eac"),
        fact("C\u00f4te"), fact("capital"), fact("..."),
    ]  # fmt: skip
    (first, *_), left_out = without_edited_neighbors(edited, edited)
    assert (len(first.neighbors), left_out) == (int(stays), int(not stays))


def test_a_template_that_names_an_edited_subject_hides_nothing():
    """Only what fills the template is the neighbor's subject."""
    template = "In Japan, {} is called"
    edited = [fact("bread", "In Japan, rice is called", "In Japan, tea is called", prompt=template), fact("Japan")]
    found, left_out = without_edited_neighbors([*edited, fact("fish", "tea is")], [*edited, fact("tea")])
    assert [neighbor.prompt for neighbor in found[0].neighbors] == ["In Japan, rice is called"]
    assert left_out == 2
    assert found[1] is edited[1]


def test_thousands_of_subjects_agree_with_a_search_for_each_of_them():
    subjects = [f"Town {i}" for i in range(0, 60, 2)] + ["Upper Town 7"]
    facts = [fact(s, *(f"People in {u}Town {i} speak" for i in range(12) for u in ("", "Upper "))) for s in subjects]
    found, left_out = without_edited_neighbors(facts, facts)
    expected = [
        [
            n.prompt for n in f.neighbors
            if not any(s != f.subject and re.search(rf"\b{s}\b", n.prompt) for s in subjects)
        ]
        for f in facts
    ]  # fmt: skip
    assert [[n.prompt for n in f.neighbors] for f in found] == expected
    assert left_out == sum(len(f.neighbors) for f in facts) - sum(map(len, expected)) > 0
    assert without_edited_neighbors(facts, []) == (facts, 0)
