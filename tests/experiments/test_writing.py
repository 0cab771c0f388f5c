"""An experiment's tables and its figure, from made-up runs."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import sequences
import sweep
import tables


def test_an_experiment_s_tables_and_figure_outlive_its_runs(tmp_path):
    written = sequences.Sequences(
        recipe="a.yaml", work=tmp_path, each="each.csv", over_seeds="means.csv", curves="curves.csv", figure="drawn",
        shown=[{"a": ("A", "#000000", "-")}], otherwise="a",
    )  # fmt: skip

    def run(case, seed, accuracy):
        folder = tmp_path / "runs" / case / f"version_{seed}"
        folder.mkdir(parents=True)
        summary = {"edits": 8, "retained": {"accuracy": accuracy, "ES": 1.0, "NS": 0.7}, "before": {"NS": 0.8},
                   "immediate": {}, "perplexity": {"before": 20.0, "after": 22.0}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.csv").write_text(f"edits,retained/accuracy\n4,1.0\n8,{accuracy}\n")
        return sweep.Run(sweep.Case(case, {}), seed, folder)

    written.write([run("a", 1, 0.5)], ["a", "b", "c"], tmp_path)
    written.write([run("b", 1, 0.75)], ["a", "b", "c"], tmp_path)
    results = tmp_path / "results"
    assert [row["retained_accuracy"] for row in tables.read_rows(results / "each.csv")] == ["0.5", "0.75"]
    means = {row["case"]: row for row in tables.read_rows(results / "means.csv")}
    assert [means[case]["accuracy_gain"] for case in ("a", "b")] == ["0.0", "0.25"]
    assert means["c"] == {"case": "c", "seeds": "0"}  # not run, and named
    assert [(row["case"], row["edits"]) for row in tables.read_rows(results / "curves.csv")] == [
        ("a", "4"), ("a", "8"), ("b", "4"), ("b", "8"),
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "figs").iterdir()} == {"drawn.png", "drawn.pdf"}
