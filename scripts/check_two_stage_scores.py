"""Checks that scores in two stages have the decisions of float32 (editlab.experiments.decisions).

    python scripts/check_two_stage_scores.py ../data/counterfact.json --split dev --facts 2000

Writes a row to ``results/two_stage_scores.csv`` after each 128 facts, for all facts so far; rows of other files stay.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import asdict
from pathlib import Path

import torch

from editlab.data import EditDataModule
from editlab.evaluation.evaluator import CHUNK
from editlab.evaluation.two_stage import EXACT_BLOCKS, MARGIN
from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.decisions import Agreement, agreement
from editlab.experiments.provenance import made_here
from editlab.lm.language_model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Scores the facts, chunk by chunk, and writes the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="fact file, or worldfacts")
    parser.add_argument("--split", default="dev", choices=["dev", "test", "all"])
    parser.add_argument("--facts", type=int, default=2000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "two_stage_scores.csv")
    given = parser.parse_args()
    where = made_here(ROOT, {name: value for name, value in vars(given).items() if name != "out"})
    data = EditDataModule(given.path, split=given.split)
    data.setup()
    facts = data.candidates[: given.facts]
    lm = LanguageModel.from_name(given.model, torch.float32)
    same = {"file": Path(given.path).name, "split": given.split, "model": given.model}
    earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
    others = [one for one in earlier if any(one[name] != value for name, value in same.items())]
    where |= {"margin": str(MARGIN), "blocks_in_float32": str(EXACT_BLOCKS), "threads": str(torch.get_num_threads()),
              "date": datetime.date.today().isoformat()}  # fmt: skip
    found = Agreement()
    for start in range(0, len(facts), CHUNK):
        found += agreement(lm, facts[start : start + CHUNK])
        nats = {name: f"{getattr(found, name):.3f}" for name in ("largest_error", "farthest_turned")}
        row = same | asdict(found) | nats | where
        write_rows([*others, row], given.out)
        print(found, flush=True)


if __name__ == "__main__":
    main()
