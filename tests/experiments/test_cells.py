"""The matrix: all cells listed, cells that share a run, and a dry run that says how long it takes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from editlab.errors import UserError
from editlab.experiments import estimate
from editlab.experiments.cells import shared_without_replay
from editlab.experiments.csv_files import read_rows
from editlab.experiments.plan import Case, Options, Run, all_cells, cases, finished, planned
from editlab.experiments.spec import load_experiment
from editlab.experiments.writing import Results
from tests.experiments.made_up import finish, options

MATRIX = load_experiment(Path(__file__).parents[2] / "configs" / "experiments" / "batch_experiments.yaml")
TABLE = "ablation_matrix.csv"


def replayed(size, rate, edits=1024):
    return shared_without_replay({"batch_size": size, "replay_rate": rate}, edits).labels["replayed_a_batch"]


def test_replayed_facts_by_hand():
    assert replayed(32, 0.3) == 10  # 9.6
    assert replayed(8, 0.1) == 1  # 0.8
    assert replayed(1, 0.3) == 0  # 0.3
    assert replayed(1, 0.5) == 1
    assert replayed(1024, 0.5) == 0  # there is no batch after the first
    assert not shared_without_replay({"batch_size": 32, "replay_rate": 0.1}, 16).possible


def test_cells_without_replay_share_a_run():
    cells = [(cell, case) for _, cell, case in all_cells(MATRIX, Options(), 1) if cell.axes["lora_rank"] == 8]
    names = {(cell.axes["batch_size"], cell.axes["replay_rate"]): case.name for cell, case in cells}
    assert len(names) == 24
    # Of batch 1, rates 0, 0.1 and 0.3 are one; of batch 1024, all four.
    assert len(set(names.values())) == 24 - 2 - 3
    assert names[1, 0.3] == names[1, 0.0] == "batch_1_rate_0_lora_8"
    assert names[32, 0.3] == "batch_32_rate_0.3_lora_8"


def test_a_case_has_the_callbacks_of_its_cell():
    found = {case.name: [callback["class_path"] for callback in case.callbacks] for case in cases(MATRIX, Options(), 1)}
    assert found["batch_32_rate_0_lora_none"] == []
    assert found["batch_32_rate_0.3_lora_none"] == ["MemoryReplay"]
    assert found["batch_32_rate_0_lora_4"] == ["LoRAAdjust"]
    assert found["batch_32_rate_0.5_lora_16"] == ["MemoryReplay", "LoRAAdjust"]


def write(given):
    runs = [run for run in planned(MATRIX, given) if run.summary is not None]
    Results(MATRIX, given, runs, finished(MATRIX, given)).write()
    return read_rows(given.out / "results" / TABLE)


def key(row):
    return row["batch_size"], row["replay_rate"], row["lora_rank"], row["seed"]


def test_the_table_lists_every_cell(tmp_path):
    given = options(tmp_path)
    finish(given.work / "batch_1_rate_0_lora_none" / "version_2", {"retained/accuracy": 0.75}, seconds=30.0)
    failed = given.work / "batch_8_rate_0.3_lora_4" / "version_1"
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text("{}")
    rows = write(given)
    found = {key(row): row for row in rows}
    assert len(found) == 6 * 4 * 4 * 3
    done = [at for at, row in found.items() if row["status"] == "done"]
    assert done == [("1", rate, "none", "2") for rate in ("0.0", "0.1", "0.3")]
    assert {found[at]["retained/accuracy"] for at in done} == {"0.75"}
    assert {(found[at]["case"], found[at]["seconds"]) for at in done} == {("batch_1_rate_0_lora_none", "30.0")}
    assert [at for at, row in found.items() if row["status"] == "failed"] == [("8", "0.3", "4", "1")]
    assert {row["status"] for row in rows} == {"done", "failed", "not run"}
    assert "retained/accuracy" not in found["512", "0.5", "16", "3"]

    # Without the runs' folders, finished rows stay; a failure is no result.
    shutil.rmtree(given.work)
    again = write(replace(given, seeds=[1]))
    assert again == [{**row, "status": row["status"].replace("failed", "not run")} for row in rows]


def test_a_row_outlives_a_retry_that_failed_and_a_seed_that_is_not_asked_for(tmp_path):
    given = options(tmp_path)
    folder = finish(given.work / "batch_1_rate_0_lora_none" / "version_4", {"retained/accuracy": 0.75}, seconds=30.0)
    write(replace(given, seeds=[4]))
    done = [row for row in write(replace(given, seeds=[1])) if row["status"] == "done"]
    assert {(row["seed"], row["retained/accuracy"]) for row in done} == {("4", "0.75")}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "failed.json").write_text("{}")
    assert [row for row in write(replace(given, seeds=[4])) if row["status"] == "done"] == done


def test_batches_larger_than_all_facts_are_not_run(tmp_path):
    where = {"lora_rank": ["none"], "replay_rate": ["0"]}
    runs = planned(MATRIX, options(tmp_path, edits=16, seeds=[1], where=where))
    assert [run.case.name for run in runs] == ["batch_1_rate_0_lora_none", "batch_8_rate_0_lora_none"]
    # 41 + 16 * 0.33 + 2 * 0.32 and 41 + 16 * 0.33 + 16 * 0.32 seconds.
    lines = estimate.report(runs, 1).splitlines()
    assert lines[1] == "to run  batch_8_rate_0_lora_none, seed 1, about 47 s"
    assert lines[2] == "2 of 2 runs are missing and take about 98 s, 1 at a time (by a formula: no run is finished)."


def test_estimates_by_hand(tmp_path):
    def run(case, seed, edits, seconds=None, **flags):
        folder = tmp_path / case / f"version_{seed}"
        if seconds:
            finish(folder, seconds=seconds)
        return Run(Case(case, {"data.limit": edits, "data.batch_size": 10, **flags}), seed, folder)

    def formula(case):
        return estimate.formula(case.case)

    small, large = run("c", 1, 20), run("d", 1, 200)
    assert formula(small) == pytest.approx(41 + 6.6 + 0.64)
    assert formula(run("e", 1, 20, **{"model.values.reference": "current"})) == pytest.approx(41 + 6.6 + 0.64 + 30)
    adjusted = Case("f", small.case.flags, [{"class_path": "LoRAAdjust"}])
    assert estimate.formula(adjusted) == pytest.approx(41 + 6.6 + 0.64 + 200)
    often = {"class_path": "LoRAAdjust", "init_args": {"every_n_batches": 1, "steps": 600}}
    twice = Case("g", small.case.flags, [often])  # 20 facts are two batches of 10
    assert estimate.formula(twice) == pytest.approx(41 + 6.6 + 0.64 + 2 * 2000)

    # With 10 s of start-up these took 5, 4 and 2 times what the formula gives.
    once = formula(small)
    done = [run("a", 1, 20, 5 * once - 10), run("a", 2, 20, 4 * once - 10), run("b", 1, 20, 2 * once - 10)]
    assert estimate.expected(run("a", 3, 20), done) == pytest.approx(4.5 * once)  # the mean of its own
    assert estimate.expected(large, done) == pytest.approx(4 * formula(large))  # the median of all
    assert estimate.expected(large, []) == formula(large)


def test_a_dry_run_says_how_long_it_takes(tmp_path):
    case = Case("a", {"data.limit": "40", "data.batch_size": 4})
    done = Run(case, 1, finish(tmp_path / "a", seconds=3590.0))
    lines = estimate.report([done, *(Run(case, seed, tmp_path) for seed in (2, 3, 4))], 2).splitlines()
    assert lines[:2] == ["done    a, seed 1", "to run  a, seed 2, about 60 min"]
    assert lines[-1] == "3 of 4 runs are missing and take about 90 min, 2 at a time (measured on 1 finished runs)."
    assert estimate.report([done], 2).splitlines()[-1] == "0 of 1 runs are missing and take no time."
    # The formula gives 41 + 13.2 + 3.2 = 57.4 s. A finished run of another case took twice as long, so the missing one
    # is expected to as well; a second worker does not help a single run.
    known = Run(Case("b", case.flags), 1, finish(tmp_path / "b", seconds=2 * 57.4 - 10))
    (line, total) = estimate.report([Run(case, 2, tmp_path)], 2, [known]).splitlines()
    assert line == "to run  a, seed 2, about 2 min"
    assert total == "1 of 1 runs are missing and take about 2 min, 2 at a time (measured on 1 finished runs)."
    for flags, message in (({"data.limit": "null", "data.batch_size": 1}, "a number for data.limit, and it is null"),
                           ({}, "needs the number data.limit: set edits")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            estimate.report([Run(Case("a", flags), 2, tmp_path)], 1)
