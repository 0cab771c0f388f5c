"""The record of a fact: what a checkpoint keeps of it."""

from __future__ import annotations

import json

import pytest

from editlab.data import Fact, Neighbor, Question

FULL = Fact(
    "Ian Fleming", "{} was born in", "Lima", "London", ("The birthplace of Ian Fleming is",),
    (Neighbor("Alec Guinness was born in", "London"),), 7, ("the City of Kings",), ("Greater London",),
    (Question("reasoning", "Ian Fleming was born in the country of", ("Peru", "Republic of Peru")),),
)  # fmt: skip


def test_a_fact_comes_back_from_json_with_all_fields():
    assert Fact.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_a_fact_of_an_older_checkpoint_has_no_aliases_and_no_questions():
    kept = {name: x for name, x in FULL.to_dict().items() if name not in ("aliases", "truth_aliases", "portability")}
    fact = Fact.from_dict(kept)
    assert (fact.aliases, fact.truth_aliases, fact.portability) == ((), (), ())
    assert fact.slot == FULL.slot


@pytest.mark.parametrize(
    ("subject", "side"),
    # The first digits of `printf 'France\nThe capital of {} is' | sha256sum` and so on: 3, 7, 6, b.
    [("France", "dev"), ("Japan", "dev"), ("Norway", "dev"), ("Peru", "test")],
)
def test_a_facts_half_is_the_first_bit_of_a_digest(subject, side):
    assert Fact(subject, "The capital of {} is", "Rome").side == side
    assert Fact(subject, "The capital of {} is", "Lima", id=9).side == side


def test_a_facts_half_does_not_depend_on_the_form_of_accents():
    # The digest of "C\u00f4te" and "{} is" begins with 06.
    assert {Fact(name, "{} is", "x").side for name in ("C\u00f4te", "Co\u0302te")} == {"dev"}
    assert Fact("\ud800", "{} is", "x").side in ("dev", "test")  # JSON may hold half a character
