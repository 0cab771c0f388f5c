"""Compares ways to find values: steps, time in turn, and quality after one solve (editlab.experiments.values_speed).

    python scripts/compare_values.py                                   # 100 built-in facts of the dev split
    python scripts/compare_values.py --facts 48 --ways "all contexts" "one context a step"
    python scripts/compare_values.py --path FILE --facts 200 --plain 4     # times the plain way too, 4 facts a round

Writes a row for each way to ``results/values_speed.csv``; rows of other files and numbers of facts stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch

from editlab.data import EditDataModule
from editlab.evaluation.scoring import prefers_truth
from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.experiments.values_speed import WAYS, measure
from editlab.lm.language_model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measures the ways and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="worldfacts", help="fact file")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plain", type=int, default=0, help="facts of each round that the plain way is timed on too")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["all contexts", "two contexts a step"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "values_speed.csv")
    given = parser.parse_args()
    where = made_here(ROOT, {name: value for name, value in vars(given).items() if name != "out"})
    lm = LanguageModel.from_name(given.model, torch.float32)
    data = EditDataModule(given.path, split="dev", limit=given.facts)
    data.setup()
    data.select(lambda facts: prefers_truth(lm, facts))
    rows = measure(lm, data.facts, given.ways, given.rounds, given.plain)
    same = {"file": Path(given.path).name, "split": "dev", "model": given.model}
    where |= {"threads": str(torch.get_num_threads()), "date": datetime.date.today().isoformat()}
    earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
    new = {(same["file"], row["way"], str(row["facts"])) for row in rows}
    others = [one for one in earlier if (one["file"], one["way"], one["facts"]) not in new]
    write_rows([*others, *(same | row | where for row in rows)], given.out)
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
