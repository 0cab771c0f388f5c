"""Growth of cost: powers by hand, the rows of the table, and the solver's axes on this machine."""

import argparse

import pytest

from editlab.experiments import csv_files
from scripts import benchmark_growth as growth
from tests.tiny import tiny_tokenizer


def points(axis, series, seconds):
    return [{"axis": axis, "series": series, "x": str(x), "seconds": str(s), "mib": "100"} for x, s in seconds.items()]


def test_powers_by_hand():
    rows = points("batch", "solve", {1: 1.0, 2: 2.0, 3: 3.0, 4: 8.0}) + points("keys", "metric", {100: 5.0})
    rows += points("edits", "plain", {32: 2.0, 320: 2.0})
    # From 2 to 4, the last doubling, time grows fourfold; where the axis has no doubling nothing can be said.
    assert growth.slopes(rows) == {("batch", "solve"): pytest.approx(2.0), ("edits", "plain"): pytest.approx(0.0)}


def test_axes_that_are_not_run_stay_and_all_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "D_K", 24)
    path = tmp_path / "results" / "cost_growth.csv"
    path.parent.mkdir()
    earlier = points("edits", "plain", {32: 2.0, 64: 2.0}) + points("batch", "solve", {7: 1.0})
    path.write_text("\n".join([",".join(earlier[0]), *(",".join(row.values()) for row in earlier)]) + "\n")
    growth.main(["--only", "batch", "buffer", "keys", "--largest", "800", "--out", str(tmp_path)])
    rows = csv_files.read_rows(path)
    assert [row["x"] for row in rows if row["axis"] == "edits"] == ["32", "64"]
    assert [int(row["x"]) for row in rows if row["axis"] == "batch"] == [2**i for i in range(11)]
    assert [(row["series"], row["x"]) for row in rows if row["axis"] == "keys"] == [("metric", "768"), ("solve", "768")]
    assert all(float(row["seconds"]) > 0 for row in rows)
    machines = {(row["axis"], row["machine"] == "unknown") for row in rows}  # the earlier table did not name it
    assert machines == {("edits", True), ("batch", False), ("buffer", False), ("keys", False)}
    assert all(row["settings"] and row["torch"] for row in rows)
    assert {p.name for p in (tmp_path / "figs").iterdir()} == {"cost_growth.png", "cost_growth.pdf"}
    assert "edits    plain         grows by the power 0.00 at its end" in capsys.readouterr().out


def test_a_sequence_is_timed_batch_by_batch(monkeypatch):
    monkeypatch.setattr(growth, "load", lambda name, dtype: (None, tiny_tokenizer()))
    found = list(growth.edits(argparse.Namespace(edits=64)))
    assert [(p.series, p.x) for p in found] == [(s, x) for s in ("plain", "replay", "consolidated") for x in (32, 64)]
    assert all(p.seconds > 0 for p in found)
