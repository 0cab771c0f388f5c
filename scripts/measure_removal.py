"""What is left of a run's other edits while 10 of 128 facts are taken out one by one (``editlab revert --facts``).

    python scripts/measure_removal.py

Edits the built-in facts by configs/emmet_replay.yaml, unless ``--run`` names a finished run, and writes
``results/removal.csv``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from editlab.cli.main import main as editlab
from editlab.experiments.csv_files import write_rows
from editlab.experiments.provenance import made_here
from editlab.experiments.removals import measure_removals

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Edit, take facts out for each seed, and write a row for each removal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run of the recipe")
    parser.add_argument("--facts", type=int, default=10, help="number of facts to take out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the choice of these facts")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "removal.csv")
    options = parser.parse_args()
    recipe = ROOT / "configs" / "emmet_replay.yaml"
    with tempfile.TemporaryDirectory() as folder:
        if options.run is None:
            logger = ["--trainer.logger.init_args.save_dir", folder]
            if editlab(["fit", "--config", str(recipe), *logger]):
                raise SystemExit("The run that facts are taken out of has failed.")
        run = options.run or f"{folder}/{recipe.stem}/version_0"
        rows = [row for seed in options.seeds for row in measure_removals(run, options.facts, seed)]
    made = made_here(ROOT, {"recipe": recipe.read_text(encoding="utf-8"), "facts": options.facts})
    write_rows([row | made for row in rows], options.results)


if __name__ == "__main__":
    main()
