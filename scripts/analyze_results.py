"""Figures from the tables of ``results/`` alone, each as ``.png`` and ``.pdf``.

    python scripts/analyze_results.py                          # every figure whose table is there, to figs/
    python scripts/analyze_results.py --only batch_size radar
    python scripts/analyze_results.py --out lightning_logs/quick    # results/ and figs/ of another folder

A figure whose table is absent, or has nothing to draw, is skipped, and a sentence says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from launch import ROOT
from matplotlib.figure import Figure
from run_forgetting import EXPERIMENT as FORGETTING
from run_lora_ablation import EXPERIMENT as LORA
from run_replay_ablation import EXPERIMENT as REPLAY
from tables import curves_figure, read_rows

from editlab.experiments.figures import bars_figure, heat_figure, lines_figure, radar_figure, roc_figure
from editlab.runs.figures import save_figure

Rows = Sequence[dict[str, Any]]

RETAINED = {"retained_ES": "efficacy (ES)", "retained_PS": "paraphrases (PS)", "retained_NS": "neighbors (NS)"}
SPOKES = {"ES": "ES", "accuracy": "accuracy", "PS": "PS", "NS": "NS",
          "perplexity_kept": "perplexity\n(before / after)"}  # fmt: skip
BARS = {"retained_ES": "retained ES", "retained_accuracy": "retained accuracy", "retained_PS": "paraphrases (PS)",
        "retained_NS": "neighbors (NS)", "perplexity_rise": "perplexity's rise, %"}  # fmt: skip
SIDE_BY_SIDE = {
    "none": "in sequence",
    "joint": "one batch of all",
    "random_0.3_200": "in sequence, replay at rate 0.3",
    "random_3_500": "in sequence, replay at rate 3",
    "consolidated": "in sequence, consolidated memory",
    "both": "in sequence, consolidated and replay",
}
"""case of the replay ablation -> label"""


class Drawing(NamedTuple):
    """One figure: where its numbers are from, and how it is drawn."""

    table: str
    script: str
    """writes the table"""
    draw: Callable[[Rows], Figure | None]
    """None where the rows have nothing to draw"""


def batch_size(rows: Rows) -> Figure | None:
    """ES, PS and NS over the batch size, a line for each replay rate, without LoRA."""
    rates = sorted({row["replay_rate"] for row in _plain_cells(rows)}, key=float)
    groups = {f"replay rate {rate}": [r for r in _plain_cells(rows) if r["replay_rate"] == rate] for rate in rates}
    return lines_figure(groups, "batch_size", RETAINED, "batch size") if groups else None


def heat_map(rows: Rows) -> Figure | None:
    """Retained accuracy and NS by replay rate and batch size, without LoRA."""
    panels = {"retained_accuracy": "retained accuracy", "retained_NS": "neighbors (NS)"}
    cells = _plain_cells(rows)
    return heat_figure(cells, "batch_size", "replay_rate", panels, ("batch size", "replay rate")) if cells else None


def _plain_cells(rows: Rows) -> Rows:
    """Cells of the matrix that were run, without LoRA."""
    return [row for row in rows if row["status"] == "done" and row["lora_rank"] == "none"]


def radar(rows: Rows) -> Figure | None:
    """The methods, by effective weight, over all metrics: at the end of a sequence, and each batch on its own."""
    panels = {}
    for way, when, title in (("sequential", "retained", "in sequence"),
                             ("independent", "immediate", "each batch on its own")):  # fmt: skip
        own = [
            {**{k.removeprefix(f"{when}_"): v for k, v in row.items()}, **_perplexity(row)}
            for row in rows
            if row["way"] == way and row.get("effective_weight")
        ]
        labels = [f"{row['method']}, weight {float(row['effective_weight']):g}" for row in own]
        panels[title] = {
            name: [row for row, label in zip(own, labels, strict=True) if label == name]
            for name in dict.fromkeys(labels)
        }
    return radar_figure(panels, SPOKES) if any(panels.values()) else None


def side_by_side(rows: Rows) -> Figure | None:
    """Editing in sequence, all at once, and in sequence with replay."""
    wider = [{**row, **_perplexity(row)} for row in rows]
    groups = {label: [row for row in wider if row["case"] == case] for case, label in SIDE_BY_SIDE.items()}
    return bars_figure(groups, BARS) if any(groups.values()) else None


def _perplexity(row: dict[str, Any]) -> dict[str, float]:
    """Perplexity before over after, and its rise in percent, where it was measured."""
    if "perplexity_ratio" not in row:
        return {}
    ratio = float(row["perplexity_ratio"])
    return {"perplexity_kept": 1 / ratio, "perplexity_rise": 100 * (ratio - 1)}


def trust_roc(rows: Rows) -> Figure | None:
    """ROC, and precision over recall, of edit trust and of what it is held against."""
    return roc_figure(rows) if rows else None


FIGURES = {
    written.figure: Drawing(written.curves, script, partial(curves_figure, shown=written.shown))
    for written, script in (
        (FORGETTING, "run_forgetting.py"),
        (REPLAY, "run_replay_ablation.py"),
        (LORA, "run_lora_ablation.py"),
    )
} | {
    "batch_size": Drawing("ablation_matrix.csv", "run_batch_experiments.py", batch_size),
    "replay_by_batch_size": Drawing("ablation_matrix.csv", "run_batch_experiments.py", heat_map),
    "radar": Drawing("baseline_comparison.csv", "run_all_baselines.py", radar),
    "sequential_batch_replay": Drawing("replay_ablation.csv", "run_replay_ablation.py", side_by_side),
    "trust_roc": Drawing("trust_roc.csv", "run_trust_eval.py", trust_roc),
}


def main() -> None:
    """Draws what can be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES), help="figures")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder whose results/ is read and figs/ written to")
    options = parser.parse_args()
    for name in options.only:
        table, script, draw = FIGURES[name]
        path = options.out / "results" / table
        if not path.exists():
            print(f"{name}: skipped, there is no results/{table} (python scripts/{script} writes it)")
            continue
        figure = draw(read_rows(path))
        if figure is None:
            print(f"{name}: skipped, nothing in results/{table} is to be drawn yet (python scripts/{script})")
            continue
        save_figure(figure, options.out / "figs" / f"{name}.png")
        print(f"{name}: figs/{name}.png and .pdf, from results/{table}")


if __name__ == "__main__":
    main()
