"""From tables to figures: each is drawn where its table is, and skipped with a sentence where it is not."""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import analyze_results as analysis
import run_replay_ablation as ablation


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def call(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze_results.py", "--out", str(folder), *arguments])
    analysis.main()


def test_each_figure_comes_from_its_table(tmp_path, monkeypatch, capsys):
    results, retained = tmp_path / "results", {"retained_ES": 1.0, "retained_accuracy": 0.9, "retained_NS": 0.8}
    for table, case in (("large_scale_forgetting", "emmet"), ("replay_ablation_curves", "none"),
                        ("lora_ablation_curves", "emmet")):  # fmt: skip
        write(results / f"{table}.csv",
              [{"case": case, "seed": s, "edits": n, **retained, "perplexity_heldout": 30 + s}
               for s in (1, 2) for n in (200, 400)])  # fmt: skip
    cell = {"lora_rank": "none", "seed": 1, **retained, "retained_PS": 0.7}
    done = [{"batch_size": b, "replay_rate": r, "status": "done", **cell} for b in (1, 8) for r in ("0.0", "0.3")]
    missing = {"batch_size": 512, "replay_rate": "0.0", "status": "not run", "lora_rank": "none", "seed": 1}
    write(results / "ablation_matrix.csv", [*done, missing])
    write(
        results / "baseline_comparison.csv",
        [
            {
                "method": "ROME",
                "effective_weight": "0.0",
                "way": "sequential",
                **retained,
                "retained_PS": 0.7,
                "perplexity_ratio": 1.25,
            }
        ],
    )
    write(
        results / "replay_ablation.csv",
        [{"case": case, **retained, "retained_PS": 0.7, "perplexity_ratio": 1.25} for case in ("none", "joint")],
    )
    write(results / "trust_roc.csv",
          [{"labels": "injected", "gate": "trust", "false_positive_rate": x, "recall": x, "precision": 0.1}
           for x in (0, 1)])  # fmt: skip
    call(monkeypatch, tmp_path)
    assert "skipped" not in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "figs").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in analysis.FIGURES for kind in ("png", "pdf")}


def test_what_can_not_be_drawn_is_skipped_with_a_sentence(tmp_path, monkeypatch, capsys):
    write(tmp_path / "results" / "ablation_matrix.csv", [{"status": "not run", "lora_rank": "none"}])
    call(monkeypatch, tmp_path, "--only", "batch_size", "radar")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "batch_size: skipped, nothing in results/ablation_matrix.csv is to be drawn yet (python "
        "scripts/run_batch_experiments.py)",
        "radar: skipped, there is no results/baseline_comparison.csv (python scripts/run_all_baselines.py writes it)",
    ]
    assert not (tmp_path / "figs").exists()


def test_perplexity_by_hand():
    figure = analysis.side_by_side([{"case": "none", "perplexity_ratio": "1.25"}])
    assert figure.axes[list(analysis.BARS).index("perplexity_rise")].patches[0].get_height() == 25.0
    memit = {"method": "MEMIT", "effective_weight": "15000.0"}
    rows = [{**memit, "way": "sequential", "perplexity_ratio": "1.25"}]
    (line,) = analysis.radar(rows).axes[0].get_lines()
    assert set(line.get_ydata()) == {0.8}
    assert line.get_label() == "MEMIT, weight 15000"
    # Independent batches have no perplexity, and what counts is right after each.
    rows = [{**memit, "way": "independent", "immediate_ES": "0.5", "retained_ES": "0.1"}]
    (line,) = analysis.radar(rows).axes[1].get_lines()
    assert set(line.get_ydata()) == {0.5}


def test_cases_named_here_are_those_of_the_experiments():
    assert set(analysis.SIDE_BY_SIDE) <= {case.name for case in ablation.cases(500)}
    for figure in analysis.FIGURES.values():
        script = Path(analysis.__file__).parent / figure.script
        assert figure.table in script.read_text()
