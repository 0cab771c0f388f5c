"""From tables to figures: each is drawn if its table exists, and skipped with a sentence otherwise."""

import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from editlab.experiments.drawing import curves_figure, draw_from_table
from editlab.experiments.figure_spec import LineSpec, RunsFigureSpec
from editlab.experiments.reproduce import draw_figures, experiment_files
from editlab.experiments.spec import load_experiment

PROJECT = Path(__file__).parents[2]
SPECS = {spec.file: spec for file in experiment_files(PROJECT) for spec in load_experiment(file).figures
         if not isinstance(spec, RunsFigureSpec)}  # fmt: skip
NOT_RUN = {"trust_graded_roc"}
"""Figures of experiments that were not run yet, as docs/experiment_scripts.md says."""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def test_each_figure_comes_from_its_table(tmp_path, capsys):
    results, retained = tmp_path / "results", {"retained/ES": 1.0, "retained/accuracy": 0.9, "retained/NS": 0.8}
    curves = {"large_scale_forgetting": ("memit_1000", "memit_1000_5000"), "replay_ablation_curves": ("none",),
              "lora_ablation_curves": ("memit",)}  # fmt: skip
    for table, cases in curves.items():
        write(results / f"{table}.csv",
              [{"case": case, "seed": s, "edits": n, **retained, "retained/perplexity": 30 + s}
               for case in cases for s in (1, 2) for n in (200, 400)])  # fmt: skip
    cell = {"lora_rank": "none", "seed": 1, **retained, "retained/PS": 0.7}
    done = [{"batch_size": b, "replay_rate": r, "status": "done", **cell} for b in (1, 8) for r in ("0.0", "0.3")]
    missing = {"batch_size": 512, "replay_rate": "0.0", "status": "not run", "lora_rank": "none", "seed": 1}
    write(results / "ablation_matrix.csv", [*done, missing])
    row = {**retained, "retained/PS": 0.7, "perplexity_ratio": 1.25}
    write(results / "baseline_comparison.csv",
          [{"method": "ROME", "effective_weight": "0.0", "way": "sequential", **row}])  # fmt: skip
    write(results / "replay_ablation.csv", [{"case": case, **row} for case in ("none", "joint")])
    write(results / "slack_dial.csv", [{"case": "memory_0", "retained/paraphrase_accuracy": 0.5, **row}])
    write(results / "tuning.csv", [{"case": "retrieval_1", "retained/generation": 0.5, **row}])
    for table in ("trust_roc", "trust_graded_roc"):
        write(results / f"{table}.csv",
              [{"labels": "injected", "gate": "trust", "false_positive_rate": x, "recall": x, "precision": 0.1}
               for x in (0, 1)])  # fmt: skip
    assert draw_figures(PROJECT, ["--out", str(tmp_path)]) == 0
    assert "skipped" not in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "figs").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in SPECS for kind in ("png", "pdf")}


def test_a_figure_without_rows_is_skipped_with_a_sentence(tmp_path, capsys):
    write(tmp_path / "results" / "ablation_matrix.csv", [{"status": "not run", "lora_rank": "none"}])
    draw_figures(PROJECT, ["--out", str(tmp_path), "--only", "batch_size", "radar"])
    assert capsys.readouterr().out.splitlines() == [
        "radar: skipped, as there is no results/baseline_comparison.csv (editlab sweep "
        "configs/experiments/baselines.yaml makes it)",
        "batch_size: skipped, as results/ablation_matrix.csv has nothing to draw yet (editlab sweep "
        "configs/experiments/batch_experiments.yaml makes it)",
    ]
    assert not (tmp_path / "figs").exists()


def figure(tmp_path, name, rows):
    write(tmp_path / "results" / SPECS[name].table, rows)
    found = draw_from_table(SPECS[name], tmp_path)
    assert isinstance(found, Figure)
    return found


def test_perplexity_by_hand(tmp_path):
    found = figure(tmp_path, "sequential_batch_replay", [{"case": "none", "perplexity_ratio": "1.25"}])
    bars = SPECS["sequential_batch_replay"].panels
    assert found.axes[list(bars).index("perplexity_rise")].patches[0].get_height() == 25.0
    memit = {"method": "MEMIT", "effective_weight": "15000.0"}
    found = figure(tmp_path, "radar", [{**memit, "way": "sequential", "perplexity_ratio": "1.25"}])
    (line,) = found.axes[0].get_lines()
    assert set(line.get_ydata()) == {0.8}
    assert line.get_label() == "MEMIT, weight 15000"
    # Independent batches have no perplexity, and are evaluated right after each edit.
    rows = [{**memit, "way": "independent", "immediate/ES": "0.5", "retained/ES": "0.1"}]
    (line,) = figure(tmp_path, "radar", rows).axes[1].get_lines()
    assert set(line.get_ydata()) == {0.5}


def test_curves_are_means_over_seeds():
    rows = [
        {"case": "a", "seed": str(seed), "edits": str(n), "retained/accuracy": str(n / 10 + seed / 100)}
        for seed in (1, 3)
        for n in (2, 4)
    ]
    shown = {"a": LineSpec("A"), "b": LineSpec("B", line=":")}
    found = curves_figure(rows, [shown, {"b": LineSpec("B")}])
    assert len(found.axes) == 4  # the second row has nothing to draw, so there is one
    # Only the accuracy was measured; its mean over the seeds is n / 10 + 0.02.
    (line,) = [line for ax in found.axes for line in ax.get_lines()]
    assert list(line.get_xdata()) == [2, 4]
    assert list(line.get_ydata()) == [pytest.approx(0.22), pytest.approx(0.42)]
    assert line.get_label() == "A"
    assert curves_figure(rows, [{"b": LineSpec("B")}]) is None


def test_the_committed_tables_have_the_columns_that_figures_name():
    for name, spec in SPECS.items():
        if name in NOT_RUN:
            assert not (PROJECT / "results" / spec.table).exists()
            continue
        assert isinstance(draw_from_table(spec, PROJECT), Figure), spec.file
        with (PROJECT / "results" / spec.table).open() as file:
            header = next(csv.reader(file))
        panels = getattr(spec, "panels", {})
        named = {*panels} if isinstance(panels, dict) else {"retained/ES", "immediate/ES"}
        named |= {"retained/accuracy", "retained/perplexity"} if spec.kind == "curves" else set()
        assert named - {"perplexity_rise"} <= {*header}, spec.file
