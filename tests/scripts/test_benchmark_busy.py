"""The benchmark with busy processes, on a tiny model: every setting computes the same values, and is timed."""

import csv
import os
from contextlib import nullcontext

import psutil
import pytest

from scripts import benchmark_busy
from scripts.benchmark_busy import Worker, busy, rows_of


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is busy with the other process")
@pytest.mark.thorough
def test_settings_are_measured_in_turn(tiny_folder, tmp_path, monkeypatch, capsys):
    counts = []
    monkeypatch.setattr(benchmark_busy, "busy", lambda count: nullcontext(counts.append(count)))  # tested below
    results = tmp_path / "results" / "busy.csv"
    rows = benchmark_busy.main([
        "--busy", "1", "--settings", "torch", "editlab", "--rounds", "2", "--facts", "2", "--steps", "2",
        "--layer", "1", "--language_model", str(tiny_folder), "--results", str(results),
    ])  # fmt: skip
    assert counts == [1]
    assert [(row["busy"], row["setting"]) for row in rows] == [(1, "torch"), (1, "editlab")]
    assert {row["times_torch_idle"] for row in rows} == {""}  # it was not measured on the idle machine
    assert all(row["lowest"] <= row["seconds_a_fact"] <= row["highest"] for row in rows)
    assert all(row["rounds"] == 2 and 1 <= row["threads"] <= os.cpu_count() for row in rows)
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["setting"] for row in written] == ["torch", "editlab"]
    assert all(row["settings"] and row["revision"] and row["machine"] and row["torch"] for row in written)
    assert capsys.readouterr().out.count("beside 1: ") == 2


def worker(seconds, digest):
    one = Worker.__new__(Worker)
    one.seconds, one.digest, one.about = seconds, digest, {"threads": 2, "torch": "2"}
    return one


def test_times_are_medians_over_those_of_torch_when_idle():
    options = benchmark_busy.parse([])
    measured = {
        0: {"torch": worker([1.0, 3.0, 2.0], "a"), "one": worker([4.0, 4.0, 4.0], "b")},
        3: {"torch": worker([9.0, 7.0, 8.0], "a")},
    }
    rows = rows_of(measured, options)
    assert [row["seconds_a_fact"] for row in rows] == [2, 4, 8]
    assert [row["times_torch_idle"] for row in rows] == [1, 2, 4]
    assert [row["same_bits"] for row in rows] == [True, False, True]
    del measured[0]
    assert rows_of(measured, options)[0]["times_torch_idle"] == ""


def test_busy_processes_end_with_the_measurement():
    before = set(psutil.Process().children())
    with busy(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
    assert not any(process.is_running() for process in started)


@pytest.mark.thorough
def test_a_worker_that_fails_is_reported(tmp_path):
    options = benchmark_busy.parse(["--language_model", str(tmp_path / "none")])
    failing = Worker("one", options)
    with pytest.raises((RuntimeError, BrokenPipeError)):
        failing.start()
    failing.stop()
