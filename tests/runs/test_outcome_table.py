"""The table of a run's edits: which probability says whether an edit is held, and which columns there are."""

from math import log

import pytest

from editlab.runs.outcome_table import is_held, outcome_table, worst_first


def row(edit, **measured):
    return {
        "edit": edit, "subject": "France", "prompt": "The capital of {} is", "target_new": "Lima", "status": "kept",
        "step": 0, **{name.replace("_", "/", 1): value for name, value in measured.items()},
    }  # fmt: skip


def test_an_unfinished_run_is_judged_right_after_each_step():
    rows = [row(1, immediate_hit=1, immediate_logp_new=log(0.5)), row(2, immediate_hit=0, immediate_logp_new=log(0.25))]
    table = outcome_table(worst_first(rows))
    assert table.header == ["edit", "prompt", "target", "status", "P after its step"]
    assert table.rows == [
        ["2", "The capital of France is", "Lima", "kept", "0.250"],
        ["1", "The capital of France is", "Lima", "kept", "0.500"],
    ]
    assert table.classes == {(0, 4): "worse", (1, 4): "better"}
    assert table.numbers == [0, 4]


def test_at_the_end_the_value_now_counts():
    now = row(1, immediate_hit=1, immediate_logp_new=0.0, retained_hit=0, retained_logp_new=log(0.125))
    gone = row(2, immediate_hit=1, immediate_logp_new=log(0.5), before_generated="Paris")
    table = outcome_table([now, gone])
    assert table.header[4:] == ["P after its step", "P now", "generated before"]
    assert [cells[4:] for cells in table.rows] == [["1.000", "0.125", ""], ["0.500", "", "Paris"]]
    assert table.classes == {(0, 5): "worse"}  # the other is not in the weights
    assert worst_first([gone, now]) == [now, gone]


@pytest.mark.parametrize(("measured", "held"), [({}, None), ({"retained_hit": 0}, False), ({"retained_hit": 1}, True)])
def test_whether_an_edit_is_held(measured, held):
    assert is_held(row(1, immediate_hit=1, **measured)) is held
