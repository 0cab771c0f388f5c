"""Fit the learned trust score on the labelled batches of configs/experiments/trust_labels.yaml.

    pip install scikit-learn
    python scripts/train_trust_score.py

Reads ``results/trust_labels.csv``, writes ``callbacks/trust/learned_score.json``, which ships, and the areas under the
curves of its cross-validated predictions, of the hand-made score and of the norm to ``results/trust_learned.csv``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from callbacks.trust.learned import SHIPPED
from callbacks.trust.training import fit_score
from editlab.experiments.csv_files import read_rows, write_rows
from editlab.experiments.provenance import made_here

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Fit, and write the score and its areas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--score", type=Path, default=SHIPPED)
    options = parser.parse_args()
    found = fit_score(read_rows(options.results / "trust_labels.csv"))
    areas, made = found["trained_on"].pop("areas"), made_here(ROOT, {"labels": "trust_labels.csv"})
    rows = [{"gate": gate, **found["trained_on"], **area} for gate, area in areas.items()]
    write_rows([{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} | made for row in rows],
               options.results / "trust_learned.csv")  # fmt: skip
    options.score.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
