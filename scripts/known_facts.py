"""Share of the facts of some files that a model prefers, and that it knows (editlab.evaluation.known).

    python scripts/known_facts.py worldfacts ../data/counterfact.json ../data/zsre.json --limit 2000

Rows of other files in the table stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import torch

from editlab.data.files import read_facts
from editlab.evaluation.known import count_held
from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.lm.language_model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measures the files and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="fact files, or worldfacts")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, help="measure this many facts of each file, the first ones")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "known_facts.csv")
    given = parser.parse_args()
    where = {**made_here(ROOT, {"limit": given.limit}), "date": datetime.date.today().isoformat()}
    lm = LanguageModel.from_name(given.model, torch.float32)
    for path in given.files:
        facts = read_facts(path, skip_bad=True)
        some = facts[: given.limit]
        start = time.perf_counter()
        held = count_held(lm, some, Path(path).name)
        row = {
            "file": Path(path).name, "facts": len(facts), "measured": held.facts, "preferred": held.preferred,
            "known": held.known, "preferred_percent": f"{100 * held.preferred / held.facts:.1f}",
            "known_percent": f"{100 * held.known / held.facts:.1f}", "model": given.model,
            "seconds": f"{time.perf_counter() - start:.0f}", "threads": torch.get_num_threads(), **where,
        }  # fmt: skip
        earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
        others = [one for one in earlier if (one["file"], one["model"]) != (row["file"], row["model"])]
        write_rows(sorted([*others, row], key=lambda one: (one["model"], one["file"])), given.out)
        print(f"{path}: the model {held}", flush=True)


if __name__ == "__main__":
    main()
