"""Rows of tables by hand: of runs, of snapshots, means over seeds, and rows whose runs are gone."""

import pytest

from editlab.experiments.csv_files import read_rows, update_rows
from editlab.experiments.statistics import wilson
from editlab.experiments.tables import provenance_of_all, rows_of_means, rows_of_runs, rows_of_snapshots
from tests.experiments.made_up import MADE, SCORES, VERSIONS, outcomes, run


def test_a_case_has_the_measures_of_its_own_runs():
    rows = [{"case": case, "seed": 1, "retained/accuracy": 0.5} for case in ("a", "b")]
    rows[0]["perplexity_ratio"] = 1.25
    a, b = rows_of_means(rows, {}, "a")
    assert (a["perplexity_ratio"], a["perplexity_ratio_gain"]) == (1.25, 0.0)
    assert "perplexity_ratio" not in b
    assert b["retained/accuracy_gain"] == 0.0


def test_provenance_of_several_rows_names_each_value_once():
    rows = [{"torch": "a"}, {"torch": "a | b"}, {"machine": "m"}, {"torch": "b | c", "recipe": ""}]
    assert provenance_of_all(rows) == {"torch": "a | b | c", "machine": "m"}


def test_means_over_seeds_and_gains_paired_by_seed(tmp_path):
    runs = [
        run(tmp_path, case, seed, {**SCORES, "retained/accuracy": accuracy})
        for case, accuracies in (("none", {1: 0.5, 2: 0.9}), ("more", {1: 0.6, 2: 1.0, 3: 0.1}))
        for seed, accuracy in accuracies.items()
    ]
    rows = rows_of_runs(runs)
    none, more = rows_of_means(rows, {}, "none")
    assert [more[f"retained/accuracy_gain{end}"] for end in ("", "_low", "_high")] == [0.1, 0.1, 0.1]
    assert (none["retained/accuracy_gain"], none["retained/accuracy"], more["seeds"]) == (0.0, 0.7, 3)
    # 12.706 (t at one degree of freedom) times the standard error, 0.2828 / 2 ** 0.5 = 0.2, either way
    assert [none[f"retained/accuracy_{end}"] for end in ("low", "high")] == pytest.approx([-1.8412, 3.2412])
    assert (more["NS_change"], more["perplexity_ratio"]) == (-0.1, 1.1)
    assert (more["NS_change_gain"], more["retained/ES_gain"], more["perplexity_ratio_gain"]) == (0.0, 0.0, 0.0)
    _, more, absent = rows_of_means(rows, {"more": "more"}, "none", ["none", "more", "absent"])
    assert (more["against"], more["retained/accuracy_gain"]) == ("more", 0.0)
    assert absent == {"case": "absent", "seeds": 0}


def test_unmeasured_metrics_are_left_out_of_the_means():
    rows = [{"case": "a", "seed": seed, "retained/accuracy": 0.5, "retained/ES": 1.0} for seed in (1, 2)]
    (found,) = rows_of_means(rows, {}, "a")
    assert {name for name in found if not name.endswith(("_gain", "_low", "_high"))} == {
        "case", "seeds", "retained/accuracy", "retained/ES", "against",
    }  # fmt: skip


LOGGED = (
    "edits,retained/accuracy,retained/perplexity,weights/layer_2/delta_norm,weights/layer_3/delta_norm,"
    "solve/layer_2/gram_condition,solve/layer_3/gram_condition,solve/layer_2/update_norm\n"
    "32,,,0.1,0.2,5,6,0.2\n"
    "200,0.75,40.25,0.3,0.25,70,12345.678,0.1\n"
    "300,0.5,41,0.3,0.25,70,80,0.05\n"
)


def curve(**settings):
    return {"class_path": "callbacks.ForgettingCurve", "init_args": settings}


def test_snapshots_hold_retained_metrics_and_the_largest_norms(tmp_path):
    made = run(tmp_path, "emmet", 1, callbacks=[curve(sample=100)], edits=280, superseded=30)  # 20 were rolled back
    (made.folder / "metrics.csv").write_text(LOGGED)
    row, last = rows_of_snapshots([made])
    assert (row["edits"], row["retained/accuracy"], row["retained/perplexity"]) == (200, 0.75, 40.25)
    assert (row["delta_norm"], row["gram_condition"]) == (0.3, 12350.0)
    assert (row["largest_update"], last["largest_update"]) == (0.2, 0.05)  # since the snapshot before
    # The last snapshot is of all standing edits, those before of a sample.
    assert (row["measured"], last["measured"]) == (100, 250)
    ends = [row[f"retained/accuracy_{end}"] for end in ("low", "high")]
    assert ends == [round(x, 4) for x in wilson(0.75, 100)]


def test_a_snapshot_is_of_the_edits_that_stood_then(tmp_path):
    """Two of four were rolled back by then, and one was edited anew later; of independent batches the last stands."""
    made = run(tmp_path, "emmet", 1, callbacks=[curve(sample=100)], edits=4, superseded=1)
    (made.folder / "metrics.csv").write_text("edits,retained/accuracy\n4,0.5\n6,0.5\n")
    outcomes(made.folder, {"a": True, "b": None, "c": None, "d": True, "e": True, "f": True})
    text = (made.folder / "outcomes.csv").read_text()
    again = text.replace("\n6,6,f,", "\n6,6,a,").replace("1,1,a,{} is,x,,0,kept", "1,1,a,{} is,x,,0,superseded")
    (made.folder / "outcomes.csv").write_text(again)
    assert [row["measured"] for row in rows_of_snapshots([made])] == [2, 3]
    independent = text.replace("{} is,x,,0,kept", "{} is,x,,0,taken out")
    for number in (4, 5, 6):
        independent = independent.replace(f"\n{number},{number},{'abcdef'[number - 1]},{{}} is,x,,0,taken out",
                                          f"\n{number},{number},{'abcdef'[number - 1]},{{}} is,x,,1,kept")  # fmt: skip
    (made.folder / "outcomes.csv").write_text(independent)
    assert [row["measured"] for row in rows_of_snapshots([made])] == [1, 3]


def test_the_sample_of_a_snapshot_is_the_case_s_or_that_of_the_saved_recipe(tmp_path):
    made = run(tmp_path, "emmet", 1, callbacks=[curve()], edits=280)
    (made.folder / "metrics.csv").write_text(LOGGED)
    first, _ = rows_of_snapshots([made])
    assert "measured" not in first  # not known
    assert "retained/accuracy_low" not in first
    saved = (
        "trainer:\n  callbacks:\n  - class_path: callbacks.forgetting.ForgettingCurve\n    init_args: {sample: 64}\n"
    )
    (made.folder / "config.yaml").write_text(saved)
    assert [row["measured"] for row in rows_of_snapshots([made])] == [64, 280]


def test_further_columns_of_a_run_by_hand(tmp_path):
    columns = ("effective_weight", "delta_norm", "seconds_an_edit", "peak_memory_mb", "seconds")
    more = {"edits": 64, "delta_norm": {"5": 0.125, "6": 0.25}, "seconds": 96.04, "peak_memory_mb": 1500.4,
            "versions": {"torch": "2"}}  # fmt: skip
    metrics = {"immediate/ES": 1.0, "immediate/accuracy": 0.5, "before/NS": 0.8, "before/perplexity": 20.0,
               "retained/S": 0.25, "retained/accuracy_age_1": 0.5}  # fmt: skip
    made = run(tmp_path, "memit", 1, metrics, labels={"method": "MEMIT"}, **more)
    (made.folder / "metrics.csv").write_text("edits,solve/layer_6/effective_weight\n32,100.0\n64,300.0\n")
    (row,) = rows_of_runs([made], columns)
    assert [row[name] for name in columns] == [300.0, 0.25, 1.501, 1500, 96.0]
    assert (row["method"], row["immediate/ES"], row["before/NS"], row["before/perplexity"]) == ("MEMIT", 1.0, 0.8, 20.0)
    assert row["retained/S"] == 0.25
    assert {"perplexity_ratio", "retained/accuracy_age_1"}.isdisjoint(row)
    assert (row["recipe"], row["torch"]) == ("a.yaml", "2")


def test_a_row_tells_how_its_facts_were_selected(tmp_path):
    facts = {"path": "f.json", "keep": "known", "split": "test", "facts": 90, "checked": 80, "known": 64,
             "neighbors": 640, "neighbors_left_out": 3}  # fmt: skip
    (row,) = rows_of_runs([run(tmp_path, "memit", 1, SCORES, facts=facts)])
    assert (row["keep"], row["split"], row["facts_checked"], row["facts_known"]) == ("known", "test", 80, 64)
    assert row["neighbors_left_out"] == 3
    assert "facts_preferred" not in row  # it was not measured
    (old,) = rows_of_runs([run(tmp_path, "memit", 2, SCORES)])
    assert "keep" not in old


def test_metrics_that_are_not_finite_are_absent(tmp_path):
    metrics = {"immediate/ES": None, "before/perplexity": 20.0, "retained/perplexity": None}
    made = run(tmp_path, "memit", 1, metrics, delta_norm={"6": None})
    (row,) = rows_of_runs([made], ["delta_norm", "effective_weight"])
    assert (row["before/perplexity"], row["delta_norm"], row["effective_weight"]) == (20.0, "", "")
    assert {"retained/perplexity", "perplexity_ratio", "immediate/ES"}.isdisjoint(row)


def test_rows_of_absent_runs_stay_and_repeated_runs_replace_theirs(tmp_path):
    path = tmp_path / "results" / "table.csv"
    made = {"recipe": "a.yaml", **MADE, **VERSIONS}
    first = [{"case": case, "seed": seed, "retained/ES": 0.5, **made} for case in ("b", "gone") for seed in (1, 2)]
    update_rows(path, first, ["gone", "b"])
    again = {"case": "b", "seed": 2, "retained/ES": 0.75, "rank": 8, **made}
    before = {"case": "a", "seed": 1, "retained/ES": 1.0, **made}
    found = update_rows(path, [again, before], ["a", "b"])  # there is no case "gone" any more
    assert [(row["case"], int(row["seed"]), float(row["retained/ES"])) for row in found] == [
        ("a", 1, 1.0), ("b", 1, 0.5), ("b", 2, 0.75),
    ]  # fmt: skip
    assert [row["case"] for row in read_rows(path)] == ["a", "b", "b"]
    assert read_rows(path)[2] == {k: str(v) for k, v in again.items()}
    assert path.read_text().splitlines()[0] == (
        "case,seed,retained/ES,rank,recipe,settings,revision,machine,editlab,torch,transformers,peft"
    )


def test_rows_have_answers_bystanders_and_all_perplexities(tmp_path):
    metrics = {"retained/generation": 0.5, "retained/bystander_accuracy": 0.25, "before/bystander_accuracy": 0.5,
               "retained/paraphrase_accuracy": 0.125, "before/perplexity": 20.0, "retained/perplexity": 25.0,
               "before/perplexity_start": 18.0, "retained/perplexity_low": 23.45678}  # fmt: skip
    (row,) = rows_of_runs([run(tmp_path, "memit", 1, metrics)])
    assert {name: row[name] for name in metrics} == {**metrics, "retained/perplexity_low": 23.457}
    assert row["perplexity_ratio"] == 1.25
    (mean,) = rows_of_means([row], {}, "memit")
    assert (mean["retained/generation"], mean["bystander_accuracy_change"]) == (0.5, -0.25)
    made = run(tmp_path, "emmet", 1, callbacks=[curve(sample=2)], edits=4)
    (made.folder / "metrics.csv").write_text(
        "edits,retained/accuracy,retained/perplexity,retained/perplexity_start\n2,1,,30\n4,1,40,31\n"
    )
    assert [snapshot["retained/perplexity"] for snapshot in rows_of_snapshots([made])] == [30.0, 31.0]
