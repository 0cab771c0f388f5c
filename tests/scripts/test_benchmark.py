"""Every case of the benchmark on a tiny model: both implementations agree, and the table has the measurements."""

import csv

import pytest
import torch

from editlab.experiments.benchmark_cases import CASES
from editlab.experiments.reference import plain_solve
from scripts import benchmark


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--language_model", str(tiny_folder), "--layer", "1", "--facts", "4", "--batch_size", "2", "--tokens",
            "1024", "--matmul", "float32", "--results", str(tmp_path / "results" / "performance.csv")]  # fmt: skip


def test_both_ways_come_out_alike_in_every_case(small, tmp_path):
    # float32 on both sides: 1e-3 is what rounding may come to over 25 steps of Adam; a missing term is far more.
    # Products in bfloat16 have eight bits.
    rows = benchmark.main([*small, "--only", *CASES])
    assert [row["case"] for row in rows] == list(CASES)
    # A value that was stopped early is another one; whether the target is said is what it is held to. With contexts
    # that take turns it is another one too.
    differences = [(row["case"], float(each)) for row in rows for each in row["difference"].split()]
    limits = {"early": 1, "values_default": 1, "evaluation_bfloat16": 0.05}
    assert all(abs(each) <= limits.get(case, 1e-3) for case, each in differences), differences
    assert all(row["plain_gflop"] > 0 for row in rows if row["case"] in ("values", "evaluation"))
    with (tmp_path / "results" / "performance.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["case"], row["unit"], row["units"]) for row in written][:2] == [
        ("values", "fact", "2"),
        ("products", "fact", "2"),
    ]
    benchmark.main([*small, "--only", "keys"])
    assert len((tmp_path / "results" / "performance.csv").read_text().splitlines()) == len(CASES) + 2


def test_a_ratio_is_the_median_over_rounds_with_its_range(monkeypatch):
    times = iter([6.0, 2.0, 9.0, 1.0, 8.0, 4.0])  # plain and ours in turn: 3, 9 and 2 times
    monkeypatch.setattr(benchmark, "timed", lambda work, device: (next(times), work()))
    rounds = [benchmark.Round(2, lambda: 1.0, lambda x=x: x, lambda a, b: b - a) for x in (1.0, 1.5, 0.75)]
    row = benchmark.measure(rounds, torch.device("cpu"), False, "")
    assert (row["ratio"], row["lowest"], row["highest"]) == (3.0, 2.0, 9.0)
    assert row["difference"] == "0.0e+00 5.0e-01 -2.5e-01"
    assert (row["plain_s"], row["our_s"], row["units"], row["rounds"]) == (4.0, 1.0, 2, 3)


def test_the_plain_update_of_one_fact_by_hand():
    # C = diag(2, 1), lambda 1, slack 1, k = (2, 1), r = 4: C^-1 k = (1, 1), k^T C^-1 k = 3, delta = 4 / (3 + 1) (1, 1).
    delta = plain_solve(torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[4.0]]).double(),
                        torch.diag(torch.tensor([2.0, 1.0])).double(), 1.0, 1.0)  # fmt: skip
    torch.testing.assert_close(delta, torch.ones(1, 2, dtype=torch.float64))
