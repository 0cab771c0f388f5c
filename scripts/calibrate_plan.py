"""Calibrate ``editlab plan`` on measured runs.

    python scripts/calibrate_plan.py
    python scripts/calibrate_plan.py --rows configs/experiments/tuning.yaml results/tuning.csv

Each ``--rows`` names an experiment, its table of runs, and its table of snapshots, if it has one. Writes
``editlab/edits/plan_calibration.json``, which ships: the fitted laws with their errors, and the rows behind them; and
the rows with what the laws predict to ``results/plan_calibration.csv``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from editlab.edits.calibration import SHIPPED
from editlab.experiments.csv_files import write_rows
from editlab.experiments.plan_calibration import calibrate
from editlab.experiments.provenance import made_here

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("configs/experiments/replay_ablation.yaml", "results/replay_ablation.csv", "results/replay_ablation_curves.csv"),
    ("configs/experiments/forgetting.yaml", "results/large_scale_final.csv", "results/large_scale_forgetting.csv"),
)


def main() -> None:
    """Forecast the rows, fit, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", action="append", metavar="FILE")
    parser.add_argument("--moments", help="Text of the second moments in place of the runs' own, such as self.")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    groups = [[ROOT / name for name in group] for group in options.rows or ROWS]
    made = made_here(ROOT, {"rows": groups, "moments": options.moments})
    found, rows = calibrate(groups, options.moments, made)
    write_rows(rows, options.results / "plan_calibration.csv")
    options.out.write_text(found.text(), encoding="utf-8")
    print(found.accuracy, found.perplexity, f"{len(found.rows)} rows", sep="\n")


if __name__ == "__main__":
    main()
