"""Outcomes of edits by hand: the rows of a ledger and its scores, the file, and what damages it."""

import math
from dataclasses import replace

import pytest
import torch

from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.evaluation.scoring import FactScores
from editlab.metrics import EditMetrics, PromptScores
from editlab.runs.outcomes import outcome_rows, outcome_values, read_outcomes, write_outcomes
from tests.facts import FACTS

A, B, C = FACTS[:3]
AGAIN = replace(A, target_new="Lima", id="again")
NAN, INF = float("nan"), float("inf")


def scores(*rows):
    """Scores from (record, logp_new, logp_true, hit_new, hit_true)."""
    record, new, true, hit_new, hit_true = zip(*rows, strict=True)
    return PromptScores(
        torch.tensor(new), torch.tensor(true), torch.tensor(hit_new), torch.tensor(hit_true), torch.tensor(record)
    )


@pytest.fixture
def ledger():
    """Four edits in two batches: A superseded by the third, B scaled, C rolled back."""
    found = Ledger()
    found.add([A, B], 0, [1.0, 0.5])
    found.add([AGAIN, replace(C, target_true=None)], 1, [1.0, 0.0])
    return found


IMMEDIATE = FactScores(
    edit=scores((0, -0.5, -1.0, True, False), (1, -2.0, -1.0, False, True), (2, -0.1, -3.0, True, False),
                (3, -0.3, NAN, True, False)),
    paraphrases=scores((0, -0.5, -1.0, True, False), (0, -1.5, -1.0, False, True), (2, -INF, -INF, False, False),
                       (3, -0.3, NAN, True, False)),
    neighbors=scores((0, -2.0, -1.0, False, True), (0, -1.0, -2.0, True, False), (1, -2.0, -1.0, False, False)),
)  # fmt: skip
RETAINED = FactScores(edit=scores((0, -4.0, -1.0, False, True), (1, -0.25, -3.0, True, False)))
"""Of the standing facts, B and AGAIN, which are the second and the third edit."""


def test_rows_by_hand(ledger):
    rows = outcome_rows(ledger, {"before": None, "immediate": IMMEDIATE, "retained": RETAINED})
    assert [(row["edit"], row["step"], row["status"], row["factor"]) for row in rows] == [
        (1, 0, "superseded", 1.0), (2, 0, "scaled", 0.5), (3, 1, "kept", 1.0), (4, 1, "rolled back", 0.0),
    ]  # fmt: skip
    first = {name: value for name, value in rows[0].items() if name.startswith("immediate/")}
    # Of two paraphrases the first is hit and preferred; of two neighbors the first keeps its truth, by both measures.
    assert first == {
        "immediate/logp_new": -0.5, "immediate/logp_true": -1.0, "immediate/hit": 1,
        "immediate/paraphrase_hits": 1, "immediate/paraphrase_preferred": 1, "immediate/paraphrases": 2,
        "immediate/neighbor_hits": 1, "immediate/neighbor_preferred": 1, "immediate/neighbors": 2,
    }  # fmt: skip
    # Without a truth nothing can be preferred; without paraphrases or neighbors there is no count.
    assert "immediate/logp_true" not in rows[3]
    assert {"immediate/paraphrase_hits", "immediate/paraphrases"} <= rows[3].keys()
    assert {"target_true", "immediate/paraphrase_preferred", "immediate/neighbors"}.isdisjoint(rows[3])
    assert "immediate/paraphrases" not in rows[1]
    # Standing facts are numbered among themselves; what is not in the weights was not measured at the end.
    assert [row.get("retained/hit") for row in rows] == [None, 0, 1, None]
    assert [row.get("retained/logp_new") for row in rows] == [None, -4.0, -0.25, None]
    assert not any(name.startswith("before/") for row in rows for name in row)


def test_the_mean_over_facts_is_the_metric(ledger):
    rows = outcome_rows(ledger, {"immediate": IMMEDIATE})
    metrics = EditMetrics()
    metrics.update(edit=IMMEDIATE.edit, paraphrases=IMMEDIATE.paraphrases, neighbors=IMMEDIATE.neighbors)
    measured = metrics.measured()
    for name in ("ES", "accuracy", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy"):
        values = outcome_values(rows, name, "immediate").values()
        assert sum(values) / len(values) == pytest.approx(measured[name], abs=1e-12), name


def test_generated_answers_are_columns_of_their_facts(ledger):
    answers = {"retained": {1: {"generated": "Lima, of course", "contains": True, "exact": False, "f1": 0.5}},
               "before": {0: {"generated": "Oslo"}, 4: {"generated": "of a fact that was not edited"}}}  # fmt: skip
    rows = outcome_rows(ledger, {"retained": RETAINED}, answers)
    assert [row.get("before/generated") for row in rows] == ["Oslo", None, None, None]
    assert rows[2]["retained/generated"] == "Lima, of course"
    assert [outcome_values(rows, name) for name in ("generation", "generation_f1", "judged")] == [
        {("again", A.subject, A.prompt, "Lima"): 1.0}, {("again", A.subject, A.prompt, "Lima"): 0.5}, {},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'text'"):
        outcome_rows(ledger, {}, {"retained": {0: {"text": "x"}}})


def test_what_is_written_is_read_back_to_the_same_bits(ledger, tmp_path):
    third = float(torch.tensor(-1 / 3))
    odd = FactScores(edit=scores((0, third, -INF, True, False), (1, -1e-9, -2.0, False, False)))
    answers = {"retained": {0: {"generated": '=HYPERLINK("x")\n"quoted", NA', "contains": 0, "exact": 0, "f1": 1 / 3}}}
    rows = outcome_rows(ledger, {"immediate": IMMEDIATE, "retained": odd}, answers)
    rows[0]["subject"], rows[1]["prompt"], rows[1]["target_new"] = "+1", "-0.5", "nan"
    write_outcomes(rows, tmp_path / "outcomes.csv")
    read = read_outcomes(tmp_path / "outcomes.csv")
    assert read == rows
    text = (tmp_path / "outcomes.csv").read_text()
    assert "\"'=HYPERLINK" in text  # a spreadsheet does not evaluate it
    assert ",-0.33333334," in text  # with the digits that float32 needs
    header = text.splitlines()[0].split(",")
    assert header[:3] == ["edit", "id", "subject"]
    assert not any(name.startswith("before/") or name.endswith("judged") for name in header)


def test_no_edits_are_a_header(tmp_path):
    write_outcomes(outcome_rows(Ledger(), {}), tmp_path / "outcomes.csv")
    assert read_outcomes(tmp_path / "outcomes.csv") == []


GOOD = "edit,id,subject,prompt,target_new,target_true,step,status,factor,retained/hit\n1,7,a,{} is,b,,0,kept,1.0,1\n"


def test_a_good_file(tmp_path):
    (tmp_path / "outcomes.csv").write_text(GOOD)
    assert read_outcomes(tmp_path / "outcomes.csv") == [
        {"edit": 1, "id": "7", "subject": "a", "prompt": "{} is", "target_new": "b", "step": 0, "status": "kept",
         "factor": 1.0, "retained/hit": 1}
    ]  # fmt: skip


@pytest.mark.parametrize("damaged", [
    "", "a,b\n1,2\n", GOOD.replace(",1\n", ",x\n"), GOOD[: GOOD.index(",kept")] + "\n", GOOD.replace(",1\n", ",1,2\n"),
    GOOD.replace("b,,0", '"b'), GOOD.replace("kept", "\udcff"),
])  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path, damaged):
    (tmp_path / "outcomes.csv").write_text(damaged, errors="surrogateescape")
    with pytest.raises(UserError, match=r"outcomes\.csv is damaged or not one of editlab's: leave the run out"):
        read_outcomes(tmp_path / "outcomes.csv")


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*outcomes\.csv: the run has not finished, or is of an older"):
        read_outcomes(tmp_path / "outcomes.csv")


def test_not_finite_scores_are_numbers(ledger):
    rows = outcome_rows(ledger, {"retained": FactScores(edit=scores((0, -INF, -INF, False, False)))})
    assert rows[1]["retained/logp_new"] == -math.inf
    assert outcome_values(rows, "ES") == {(str(B.id), B.subject, B.prompt, B.target_new): 0.0}
