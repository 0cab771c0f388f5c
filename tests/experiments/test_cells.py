"""The matrix: all cells named, cells that are one run run once, and a dry run that says how long."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import dry_run
import run_batch_experiments as matrix
import sweep
import tables


def call(monkeypatch, tmp_path, *arguments):
    given = ["--path", "worldfacts", "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", ["run_batch_experiments.py", *given])
    matrix.main()


def finish(tmp_path, case, seed, seconds, accuracy=0.5):
    """A finished run's folder."""
    folder = tmp_path / "runs" / case / f"version_{seed}"
    folder.mkdir(parents=True)
    summary = {"edits": 1024, "retained": {"accuracy": accuracy}, "immediate": {"ES": 1.0}, "before": {},
               "perplexity": {}, "seconds": seconds, "versions": {"torch": "2"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_what_is_replayed_by_hand():
    assert matrix.Cell(32, 0.3, 0).replayed(1024) == 10  # 9.6
    assert matrix.Cell(8, 0.1, 0).replayed(1024) == 1  # 0.8
    assert matrix.Cell(1, 0.3, 0).replayed(1024) == 0  # 0.3
    assert matrix.Cell(1, 0.5, 0).replayed(1024) == 1
    assert matrix.Cell(1024, 0.5, 0).replayed(1024) == 0  # there is no batch after the first


def test_cells_that_replay_nothing_are_one_run():
    cells = [cell for cell in matrix.MATRIX if cell.lora_rank == 8]
    names = {(cell.batch_size, cell.replay_rate): cell.case(1024).name for cell in cells}
    assert len(names) == 24
    # Of batch 1, rates 0, 0.1 and 0.3 are one; of batch 1024, all four.
    assert len(set(names.values())) == 24 - 2 - 3
    assert names[1, 0.3] == names[1, 0.0] == "batch_1_rate_0_lora_8"
    assert names[32, 0.3] == "batch_32_rate_0.3_lora_8"


def test_a_case_has_the_callbacks_of_its_cell():
    classes = {
        cell: [callback["class_path"] for callback in matrix.Cell(32, *cell).case(1024).callbacks]
        for cell in ((0.0, 0), (0.3, 0), (0.0, 4), (0.5, 16))
    }
    assert classes == {(0.0, 0): [], (0.3, 0): ["MemoryReplay"], (0.0, 4): ["LoRAAdjust"],
                       (0.5, 16): ["MemoryReplay", "LoRAAdjust"]}  # fmt: skip


def test_the_table_names_every_cell(tmp_path, monkeypatch):
    finish(tmp_path, "batch_1_rate_0_lora_none", 2, 30.0, accuracy=0.75)
    failed = tmp_path / "runs" / "batch_8_rate_0.3_lora_4" / "version_1"
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"batch_8_rate_0\.3_lora_4, seed 1"):
        call(monkeypatch, tmp_path, "--no-run")
    with (tmp_path / "out" / "results" / "ablation_matrix.csv").open() as file:
        found = {(r["batch_size"], r["replay_rate"], r["lora_rank"], r["seed"]): r for r in csv.DictReader(file)}
    assert len(found) == 6 * 4 * 4 * 3
    done = [key for key, row in found.items() if row["status"] == "done"]
    assert done == [("1", rate, "none", "2") for rate in ("0.0", "0.1", "0.3")]
    assert {found[key]["retained_accuracy"] for key in done} == {"0.75"}
    assert {(found[key]["case"], found[key]["seconds"]) for key in done} == {("batch_1_rate_0_lora_none", "30.0")}
    assert [key for key, row in found.items() if row["status"] == "failed"] == [("8", "0.3", "4", "1")]
    assert {row["status"] for row in found.values()} == {"done", "failed", "not run"}
    assert found["512", "0.5", "16", "3"]["retained_accuracy"] == ""

    # Without the runs' folders, what the table has stays; what failed is no result.
    path = tmp_path / "out" / "results" / "ablation_matrix.csv"
    before = tables.read_rows(path)
    shutil.rmtree(tmp_path / "runs")
    call(monkeypatch, tmp_path, "--no-run", "--seeds", "1")
    assert tables.read_rows(path) == [{**row, "status": row["status"].replace("failed", "not run")} for row in before]


def test_a_row_outlives_a_retry_that_failed_and_a_seed_that_is_not_asked_for(tmp_path, monkeypatch):
    finish(tmp_path, "batch_1_rate_0_lora_none", 4, 30.0, accuracy=0.75)
    call(monkeypatch, tmp_path, "--no-run", "--seeds", "4")
    call(monkeypatch, tmp_path, "--no-run", "--seeds", "1")
    path = tmp_path / "out" / "results" / "ablation_matrix.csv"
    done = [row for row in tables.read_rows(path) if row["status"] == "done"]
    assert {(row["seed"], row["retained_accuracy"]) for row in done} == {("4", "0.75")}
    folder = tmp_path / "runs" / "batch_1_rate_0_lora_none" / "version_4"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "failed.json").write_text("{}")
    with pytest.raises(SystemExit, match="failed"):
        call(monkeypatch, tmp_path, "--no-run", "--seeds", "4")
    assert [row for row in tables.read_rows(path) if row["status"] == "done"] == done


def test_batches_larger_than_all_facts_are_not_run(tmp_path, monkeypatch, capsys):
    call(monkeypatch, tmp_path, "--dry-run", "--edits", "16", "--ranks", "0", "--rates", "0", "--seeds", "1")
    printed = capsys.readouterr().out
    assert "batch_8_rate_0_lora_none, seed 1" in printed
    assert "batch_32" not in printed
    # 41 + 16 * 0.33 + 2 * 0.32 and 41 + 16 * 0.33 + 16 * 0.32 seconds.
    assert "batch_8_rate_0_lora_none, seed 1, about 47 s" in printed
    assert "2 of 2 runs are to be made: about 98 s, 1 at a time (by a formula, no run is finished)" in printed
    assert not (tmp_path / "out").exists()


def test_estimates_by_hand(tmp_path):
    def run(case, seed, edits, seconds=None, **flags):
        folder = finish(tmp_path, case, seed, seconds) if seconds else tmp_path / "runs" / case / f"version_{seed}"
        return sweep.Run(sweep.Case(case, {"data.limit": edits, "data.batch_size": 10, **flags}), seed, folder)

    def formula(case):
        return dry_run.formula(case.case)

    small, large = run("c", 1, 20), run("d", 1, 200)
    assert formula(small) == pytest.approx(41 + 6.6 + 0.64)
    assert formula(run("e", 1, 20, **{"model.values.reference": "current"})) == pytest.approx(41 + 6.6 + 0.64 + 30)
    adjusted = sweep.Case("f", small.case.flags, [{"class_path": "LoRAAdjust"}])
    assert dry_run.formula(adjusted) == pytest.approx(41 + 6.6 + 0.64 + 200)
    often = {"class_path": "LoRAAdjust", "init_args": {"every_n_batches": 1, "steps": 600}}
    twice = sweep.Case("g", small.case.flags, [often])  # as 20 facts are two batches of 10
    assert dry_run.formula(twice) == pytest.approx(41 + 6.6 + 0.64 + 2 * 2000)

    # With 10 s of start-up these took 5, 4 and 2 times what the formula gives.
    once = formula(small)
    done = [run("a", 1, 20, 5 * once - 10), run("a", 2, 20, 4 * once - 10), run("b", 1, 20, 2 * once - 10)]
    assert dry_run.expected(run("a", 3, 20), done) == pytest.approx(4.5 * once)  # the mean of its own
    assert dry_run.expected(large, done) == pytest.approx(4 * formula(large))  # the middle of all
    assert dry_run.expected(large, []) == formula(large)


def test_a_dry_run_says_how_long(tmp_path, capsys):
    case = sweep.Case("a", {})
    done = sweep.Run(case, 1, finish(tmp_path, "a", 1, 3590.0))
    dry_run.show([done, *(sweep.Run(case, seed, tmp_path) for seed in (2, 3, 4))], 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["done    a, seed 1", "to run  a, seed 2, about 60 min"]
    assert lines[-1] == "3 of 4 runs are to be made: about 90 min, 2 at a time (measured on 1 finished runs)"
    dry_run.show([done], 2)
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 runs are to be made: nothing to wait for"
