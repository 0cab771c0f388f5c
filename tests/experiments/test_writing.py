"""An experiment's tables from made-up runs; rows outlive their runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from editlab.errors import UserError
from editlab.experiments.csv_files import read_rows
from editlab.experiments.plan import finished, planned
from editlab.experiments.spec import load_experiment
from editlab.experiments.writing import Results
from tests.experiments.made_up import MADE, SCORES, VERSIONS, finish, options

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiments"


def write(experiment, given):
    runs = [run for run in planned(experiment, given) if run.summary is not None]
    Results(experiment, given, runs, finished(experiment, given)).write()


CASES = "cases: {a: {labels: {way: x}}, b: {labels: {way: y}}, c: {}}\n"


def load(folder, text):
    (folder / "recipe.yaml").write_text("")
    (folder / "my.yaml").write_text("recipe: recipe.yaml\n" + CASES + text)
    return load_experiment(folder / "my.yaml")


def test_tables_of_runs_means_and_snapshots_outlive_the_runs(tmp_path):
    experiment = load(
        tmp_path,
        """
tables:
- {file: each.csv, rows: runs}
- {file: part.csv, rows: runs, where: {way: y}}
- {file: means.csv, rows: means, against: a}
- {file: curves.csv, rows: snapshots}
- {file: turns.csv, rows: turns}
copies: [{file: events.jsonl, case: b}]
""",
    )
    given = options(tmp_path, seeds=[1])
    for case, accuracy in (("a", 0.5), ("b", 0.75)):
        folder = finish(given.work / case / "version_1", {**SCORES, "retained/accuracy": accuracy})
        (folder / "metrics.csv").write_text(f"edits,retained/accuracy\n4,1.0\n8,{accuracy}\n")
        (folder / "events.jsonl").write_text(case)
        write(experiment, replace(given, only=[case]))
        (folder / "summary.json").unlink()  # the other one is written without it
    results = given.out / "results"
    assert [row["retained/accuracy"] for row in read_rows(results / "each.csv")] == ["0.5", "0.75"]
    assert [row["case"] for row in read_rows(results / "part.csv")] == ["b"]
    means = {row["case"]: row for row in read_rows(results / "means.csv")}
    assert [means[case]["retained/accuracy_gain"] for case in ("a", "b")] == ["0.0", "0.25"]
    assert means["c"] == {"case": "c", "seeds": "0"}  # not run, but listed
    assert [(row["case"], row["edits"]) for row in read_rows(results / "curves.csv")] == [
        ("a", "4"), ("a", "8"), ("b", "4"), ("b", "8"),
    ]  # fmt: skip
    assert {row["case"] for row in read_rows(results / "turns.csv")} == {"a", "b"}
    assert (results / "events.jsonl").read_text() == "b"


def test_without_any_finished_run_nothing_is_written(tmp_path):
    experiment = load(tmp_path, "tables: [{file: each.csv, rows: runs}, {file: means.csv, rows: means, against: a}]")
    write(experiment, options(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("table", "message"), [
    ("{file: t.csv, rows: row}", r"t\.csv is of unknown rows 'row': there are runs, .* or give the import path"),
    ("{file: t.csv, rows: runs, columns: [second]}", r"t\.csv has an unknown column 'second': there are .*seconds"),
    ("{file: t.csv, rows: nowhere.rows}", r"There is no function 'nowhere\.rows': correct its import path"),
])  # fmt: skip
def test_unknown_rows_and_columns_are_refused(tmp_path, table, message):
    experiment = load(tmp_path, f"tables: [{table}]")
    finish(tmp_path / "runs" / "a" / "version_1")
    with pytest.raises(UserError, match=message):
        write(experiment, options(tmp_path, seeds=[1]))


def test_a_row_without_provenance_is_refused(tmp_path):
    experiment = load(tmp_path, "tables: [{file: each.csv, rows: runs}]")
    given = options(tmp_path, seeds=[1])
    for case in ("a", "b"):
        finish(given.work / case / "version_1", SCORES)
    (given.work / "b" / "version_1" / "provenance.json").unlink()  # as of a run by hand
    message = r"each\.csv is not written, because case b, seed 1 does not say with which settings, revision, machine "
    with pytest.raises(UserError, match=message):
        write(experiment, given)
    assert not (given.out / "results" / "each.csv").exists()


def test_rows_of_older_tables_stay_with_what_they_lack_as_unknown(tmp_path):
    experiment = load(tmp_path, "tables: [{file: each.csv, rows: runs}, {file: means.csv, rows: means, against: a}]")
    given = options(tmp_path, seeds=[1])
    (given.out / "results").mkdir(parents=True)
    (given.out / "results" / "each.csv").write_text("case,seed,edits,retained/accuracy,recipe,torch\nb,1,8,0.5,r,1.9\n")
    finish(given.work / "a" / "version_1", SCORES)
    write(experiment, given)
    new, old = read_rows(given.out / "results" / "each.csv")
    assert [new[name] for name in MADE] == [*MADE.values()]
    assert (old["torch"], old["revision"], old["machine"], old["editlab"]) == ("1.9", "unknown", "unknown", "unknown")
    assert [row.get("revision") for row in read_rows(given.out / "results" / "means.csv")] == [
        "abc1234",
        "unknown",
        None,
    ]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "results").glob("*.csv")), ids=lambda p: p.stem)
def test_committed_tables_can_be_read(path):
    assert read_rows(path)


def rows_of_my_own(runs):
    return [{"case": run.case.name, "seed": run.seed, "twice": 2 * run.summary["edits"]} for run in runs]


def test_rows_of_a_function_of_one_s_own(tmp_path):
    experiment = load(tmp_path, f"tables: [{{file: t.csv, rows: {__name__}.rows_of_my_own}}]")
    finish(tmp_path / "runs" / "b" / "version_1")
    write(experiment, options(tmp_path, seeds=[1]))
    (row,) = read_rows(tmp_path / "out" / "results" / "t.csv")
    assert row == {"case": "b", "seed": "1", "twice": "16", "recipe": "recipe.yaml", **MADE, **VERSIONS}


def summed(runs):
    return [{"edits": sum(run.summary["edits"] for run in runs)}]


def test_a_row_of_several_runs_names_what_all_were_made_with(tmp_path):
    experiment = load(tmp_path, f"tables: [{{file: t.csv, rows: {__name__}.summed}}]")
    for case, torch in (("a", "2"), ("b", "3")):
        finish(tmp_path / "runs" / case / "version_1", versions={**VERSIONS, "torch": torch})
    write(experiment, options(tmp_path, seeds=[1]))
    (row,) = read_rows(tmp_path / "out" / "results" / "t.csv")
    assert (row["edits"], row["torch"], row["revision"]) == ("16", "2 | 3", "abc1234")


@pytest.mark.parametrize("name", ["baselines", "replay_ablation", "lora_ablation", "forgetting"])
def test_committed_tables_say_what_they_were_made_with(tmp_path, name):
    experiment = load_experiment(EXPERIMENTS / f"{name}.yaml")
    case = next(iter(experiment.cases))
    finish(tmp_path / "runs" / case / "version_1", SCORES, delta_norm={"6": 0.25}, seconds=8.0, peak_memory_mb=100.0,
           versions=VERSIONS)  # fmt: skip
    write(experiment, options(tmp_path))
    written = list((tmp_path / "out" / "results").iterdir())
    assert written
    for table in written:
        for row in read_rows(table):
            if row.get("seeds") != "0":
                assert (row["recipe"], row["torch"]) == (experiment.recipe, "2")


def test_a_first_table_of_a_part_leaves_the_others_whole(tmp_path):
    experiment = load(
        tmp_path,
        """
tables:
- {file: x.csv, rows: runs, where: {way: x}}
- {file: y.csv, rows: runs, where: {way: y}}
- {file: all.csv, rows: runs}
""",
    )
    given = options(tmp_path, seeds=[1])
    for case in ("a", "b"):
        finish(given.work / case / "version_1", SCORES)
    write(experiment, given)

    def cases(name):
        return [row["case"] for row in read_rows(given.out / "results" / name)]

    assert (cases("x.csv"), cases("y.csv"), cases("all.csv")) == (["a"], ["b"], ["a", "b"])


def test_grids_of_different_axes_share_a_table_of_cells(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "my.yaml").write_text(
        """
recipe: recipe.yaml
seeds: [1]
grids:
- {name: "x_{x}", axes: {x: [1, 2]}, flags: {data.batch_size: "{x}"}}
- {name: "y_{y}", axes: {y: [3]}, flags: {data.limit: "{y}"}}
tables: [{file: cells.csv, rows: cells}]
"""
    )
    experiment, given = load_experiment(tmp_path / "my.yaml"), options(tmp_path, seeds=[1])
    finish(given.work / "y_3" / "version_1", SCORES)
    for _ in range(2):  # the second reads the table of the first
        write(experiment, given)
        rows = read_rows(given.out / "results" / "cells.csv")
        assert [(row["case"], row.get("x"), row.get("y"), row["status"]) for row in rows] == [
            ("x_1", "1", None, "not run"), ("x_2", "2", None, "not run"), ("y_3", None, "3", "done"),
        ]  # fmt: skip
