"""Removals from a patch: which fact a name means, and which recipes allow one. Whole removals: tests/cli/commands."""

from dataclasses import replace

import pytest
import torch
import yaml

from editlab.errors import UserError
from editlab.runs.delta import Delta
from editlab.runs.history import Edit, History, Removed
from editlab.runs.removal import find_edits, removal_recipe
from editlab.solver.methods import EMMET, MEMIT

EDITS = (
    Edit("France", "The capital of {} is", "Rome", "Paris", 1, "superseded by edit 3"),
    Edit("Japan", "The capital of {} is", "Rome", "Tokyo", 1, "rolled back"),
    Edit("France", "The capital of {} is", "Oslo", "Paris", 2, "kept", (("The capital of Peru is", "Lima"),)),
    Edit("France", "{} lies in", "Asia", "Europe", 2, "scaled to 0.5"),
    Edit("a|b", "{} is", "c", None, 2, "kept"),
)
MODEL = {
    "method": {"class_path": "editlab.solver.methods.EMMET", "init_args": {"covariance_weight": 3000.0}},
    "moments": {"tokens": 256, "of_another_version": 1},
    "preserve_prompt_tokens": 1.0,
}


def delta(model=MODEL, trainer=None, **changes):
    settings = yaml.safe_dump({"model": model, "data": {}, **({"trainer": trainer} if trainer else {})})
    history = History(2, edits=EDITS, settings=settings)
    return replace(Delta("m", "f", torch.float32, [3], {"h.3.out": torch.zeros(2, 3)}, history), **changes)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["France|The capital of {} is"], [2]),
        (["France|The capital of France is"], [2]),
        (["a|b|{} is", "France|{} lies in"], [3, 4]),
        (["a|b", "a|b|{} is"], [4]),  # the subject alone is enough, and a fact is taken out once
    ],
)
def test_a_fact_is_named_by_subject_and_prompt(names, found):
    assert find_edits(EDITS, names) == found


def test_a_prompt_of_several_lines_is_named_as_the_log_shows_it():
    edits = (Edit("France", "Q: What is the capital of {}?\nA:  ", "Rome", "Paris", 1, "kept"),)
    for name in ("France|Q: What is the capital of {}? A:", "France|Q: What is the capital of France?\nA:"):
        assert find_edits(edits, [name]) == [0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("France", r"Several edits are 'France', such as France\|The capital of \{\} is and France\|\{\} lies in"),
        ("Japan|The capital of {} is", r"is not in the weights \(rolled back\)"),
        ("Peru|The capital of {} is", r"No edit is 'Peru\|The capital of \{\} is'"),
        ("", "No edit is ''"),
    ],
)
def test_names_that_mean_no_standing_fact(name, message):
    with pytest.raises(UserError, match=message):
        find_edits(EDITS, [name])


def test_a_removal_has_the_settings_of_the_run():
    method, moments, settings = removal_recipe(delta())
    assert method == EMMET(covariance_weight=3000.0)
    assert moments.tokens == 256
    assert (settings.hold, settings.context_key_weight) == (10.0, 1.0)  # 1 / EMMET's slack of 0.1
    memory = {"class_path": "callbacks.MemoryReplay", "init_args": {"past_weight": 4.0}}
    assert removal_recipe(delta(trainer={"callbacks": [memory]}))[2].hold == 4
    assert removal_recipe(delta(trainer={"callbacks": [memory]}), hold=7.0)[2].hold == 7
    named = {**MODEL, "method": {"class_path": "MEMIT"}}
    assert removal_recipe(delta(named))[0] == MEMIT()


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (replace(delta(), history=History(1)), "recipe of the edits is not known"),
        (delta({**MODEL, "method": {"class_path": "editlab.training.methods.FineTune"}}), "by the method FineTune"),
        (delta({**MODEL, "method": {"class_path": "mine.EMMET"}}), "by the method EMMET"),
        (delta({**MODEL, "method": None}), "by the method unknown"),
        (delta({**MODEL, "method": {"class_path": "EMMET", "init_args": {"gamma": 1}}}), "does not have"),
        (replace(delta(), totals={"h.3.out": torch.zeros(2, 3), "h.3.up": torch.zeros(2, 3)}), "LoRAAdjust"),
        (replace(delta(), history=replace(delta().history, adapted=1)), "LoRAAdjust"),
    ],
)
def test_patches_whose_facts_cannot_be_taken_out(patch, message):
    with pytest.raises(UserError, match=message):
        removal_recipe(patch)


def test_a_history_keeps_neighbors_and_removals():
    history = replace(delta().history, removals=(Removed("2026-01-01T00:00:00Z", (3,), {"others": 2.0}),), when="then")
    assert History.from_json(history.to_json()) == history
    assert history.edits[2].fact.neighbors[0].truth == "Lima"


def test_a_prompt_that_ends_in_white_space_is_named_as_it_is_shown():
    edits = (Edit("France", "The capital of {} is ", "Rome", "Paris", 1, "kept"),)
    for name in ("France|The capital of {} is ", "France|The capital of {} is", "France|The capital of France is "):
        assert find_edits(edits, [name]) == [0]
