"""What the page shows of a run: points of curves, facts that are chosen, and decisions."""

import json

import pytest

from editlab.errors import UserError
from editlab.view.contents import ALL, FORGOTTEN, LOST, NEVER, UNDONE, chosen, decisions_in, outcomes_of, panels

CURVE = {
    2: {"before/ES": 0.0, "immediate/ES": 1.0},
    4: {"before/ES": 0.25, "immediate/ES": 1.0, "retained/ES": 0.5, "retained/perplexity": 25.5,
        "retained/perplexity_start": 24.0},
}  # fmt: skip


def test_points_of_the_panels():
    metrics = {"before/perplexity": 20.0, "before/perplexity_start": 19.0}
    efficacy, perplexity = panels(CURVE, metrics)
    assert (efficacy.title, efficacy.fraction) == ("efficacy (ES)", True)
    assert efficacy.points == (
        (2, "before", 0.0), (4, "before", 0.25), (2, "immediate", 1.0), (4, "immediate", 1.0), (4, "retained", 0.5),
    )  # fmt: skip
    # On the tokens that are measured at every point, and the unedited model's on the same.
    assert perplexity.points == ((4, "retained", 24.0), (0, "before", 19.0), (4, "before", 19.0))
    assert not perplexity.fraction


def test_what_was_not_measured_has_no_panel():
    assert panels({}, {"before/perplexity": 20.0}) == []
    assert [panel.title for panel in panels({2: {"before/ES": 0.0}}, {})] == ["efficacy (ES)"]


def fact(edit, status="kept", learnt=1, held=None, **texts):
    row = {"edit": edit, "subject": "France", "prompt": "The capital of {} is", "target_new": "Tokyo", "step": 0}
    row |= {"status": status, "immediate/hit": learnt, **texts}
    return row if held is None else row | {"retained/hit": held}


ROWS = [
    fact(1, held=1),
    fact(2, held=0),
    fact(3, held=0, learnt=0),
    fact(4, "rolled back"),
    fact(5, "scaled", held=1, **{"retained/generated": "PARIS is large", "target_true": "Paris"}),
    fact(6, learnt=0),  # of a run that goes on
]


@pytest.mark.parametrize(
    ("kind", "words", "edits"),
    [
        (ALL, "", [1, 2, 3, 4, 5, 6]),
        (LOST, "", [2, 3]),
        (FORGOTTEN, "", [2]),
        (NEVER, "", [3, 6]),
        (UNDONE, "", [4]),
        (ALL, "paris france", [5]),
        (LOST, "paris", []),
        (ALL, "<script>", []),
    ],
)
def test_chosen_facts(kind, words, edits):
    assert [row["edit"] for row in chosen(ROWS, kind, words)] == edits


def test_a_run_without_outcomes_and_checkpoint_has_no_facts(tmp_path):
    assert outcomes_of(tmp_path) == []


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="cannot be read"):
        outcomes_of(tmp_path)


def test_decisions_while_they_are_written(tmp_path):
    events = [
        {"step": 0, "kind": "batch", "decision": "keep", "score": 0.9, "threshold": 0.5, "reason": ""},
        {"step": 1, "kind": "fact", "decision": "drop", "score": 0.125, "threshold": 0.5,
         "fact": {"subject": "France", "target_new": "Lima"}},
        {"step": 1, "kind": "batch", "decision": "scale", "factor": 0.25, "score": None, "reason": "score is low"},
        {"step": 2, "kind": "batch", "decision": "rollback", "score": 0.0, "threshold": 0.5, "reason": "not finite"},
        {"step": 3, "other": "program"},
    ]  # fmt: skip
    half = json.dumps({"step": 4, "decision": "keep", "reason": "\u00e9"}, ensure_ascii=False).encode()[:-4]
    lines = "".join(json.dumps(event) + "\n" for event in events).encode()
    (tmp_path / "trust_events.jsonl").write_bytes(lines + half)
    (tmp_path / "empty_events.jsonl").touch()
    (found,) = decisions_in(tmp_path)
    assert found.title == "trust"
    assert found.counts == "1 accepted, 1 left out (fact), 1 scaled, 1 rolled back"
    assert found.table.rows == [
        ["3", "rolled back", "0.00", "0.50", "not finite"],
        ["2", "scaled to 0.25", "", "", "score is low"],
        ["2", "left out (fact)", "0.12", "0.50", "France: Lima"],
        ["1", "accepted", "0.90", "0.50", ""],
    ]
    (found,) = decisions_in(tmp_path, all_events=False)
    assert [row[0] for row in found.table.rows] == ["3", "2", "2"]
