"""Tests that texts in CSV files are no formulas to a spreadsheet, and that every writer and reader agrees on it."""

import csv
import math

import pytest

from editlab.cli.main import main
from editlab.experiments.csv_files import read_rows, write_rows
from editlab.utils.csv_cells import FORMULA, defused, restored
from tests.experiments.made_up import MADE, VERSIONS
from tests.runs.test_folders import write_run

EVIL = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")']
HARMLESS = ["", "Peru", "'tis", "a=b", "-1.5", "+3", "1e-05", "-inf", "nan", "日本"]


@pytest.mark.parametrize("text", EVIL)
def test_a_formula_is_defused_and_comes_back(text):
    assert not defused(text).startswith(FORMULA)
    assert restored(defused(text)) == text


@pytest.mark.parametrize("cell", [*HARMLESS, -1.5, 3, True, None, math.inf])
def test_other_cells_stay_as_they_are(cell):
    assert defused(cell) is cell
    if isinstance(cell, str):
        assert restored(cell) == cell


def test_rows_of_experiments_round_trip(tmp_path):
    texts = {f"t{i}": text for i, text in enumerate([*EVIL[:4], *HARMLESS[1:]])}
    row = {"case": "=evil", "seed": 1, "ES": -0.25, "tiny": -5e-324, **texts, **MADE, **VERSIONS}
    write_rows([row], tmp_path / "a.csv")
    (back,) = read_rows(tmp_path / "a.csv")
    assert (float(back["ES"]), float(back["tiny"])) == (-0.25, -5e-324)
    assert back == {name: str(value) for name, value in row.items()}
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert all(not cell.startswith(FORMULA) or float(cell) is not None for cell in cells)


def test_compare_writes_no_formula(tmp_path, capsys):
    for folder, method in (("=1+1", "@SUM"), ("b", "x")):
        write_run(tmp_path / "logs" / folder / "version_1", rate=0.5, text=method)
    assert main(["compare", str(tmp_path / "logs"), "--csv", str(tmp_path / "runs.csv")]) == 0
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["group"] for row in rows} == {"'=1+1", "b"}
    assert {row["MemoryReplay.text"] for row in rows} == {"'@SUM", "x"}
