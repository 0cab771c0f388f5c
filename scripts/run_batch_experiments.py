"""The matrix of batch size, replay rate and LoRA rank on the same facts, over seeds.

    python scripts/run_batch_experiments.py --dry-run                  # cells, and how long the missing ones will take
    python scripts/run_batch_experiments.py                            # every cell; goes on where it stopped
    python scripts/run_batch_experiments.py --batches 32 128 --rates 0 0.3 --ranks 0 --seeds 1
    python scripts/run_batch_experiments.py --launcher ray --workers 2     # over the machines of a Ray cluster

So many runs are measured with products in bfloat16, which is less than half the work on CPUs that multiply so and moves
their numbers by half a point or so, alike in all (``docs/performance.md``).

Writes ``results/ablation_matrix.csv``: a row for every cell of the matrix and seed, also for those that were not run,
or failed; those of runs that are not at hand stay as they are. Cells in which nothing is ever replayed (a rate that
rounds to no fact of a batch, or one batch of all facts) share the run of rate 0; ``case`` says which run a row is from.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

from sweep import (
    ROOT,
    Case,
    add_texts,
    at_hand,
    common_flags,
    exit_where_failed,
    in_a_sentence,
    parser,
    planned,
    run_all,
)
from tables import read_rows, table_rows, write_rows

RECIPE = "configs/emmet_consolidated.yaml"
BATCHES = (1, 8, 32, 128, 512, 1024)
RATES = (0.0, 0.1, 0.3, 0.5)
RANKS = (0, 4, 8, 16)
"""0 is without LoRA."""
SEEDS = (1, 2, 3)
TABLE = "ablation_matrix.csv"
KEY = ("batch_size", "replay_rate", "lora_rank", "seed")
"""Columns that name a row."""


@dataclass(frozen=True)
class Cell:
    """One place of the matrix."""

    batch_size: int
    replay_rate: float
    lora_rank: int

    def replayed(self, edits: int) -> int:
        """Facts that are replayed in each batch after the first, as ``MemoryReplay`` rounds them."""
        return math.floor(self.replay_rate * self.batch_size + 0.5) if self.batch_size < edits else 0

    def case(self, edits: int) -> Case:
        """The run that it is read from; the buffer holds all edits, so that the rate alone says what is replayed."""
        cell = self if self.replayed(edits) else replace(self, replay_rate=0.0)
        replay = {"class_path": "MemoryReplay", "init_args": {"rate": cell.replay_rate, "capacity": edits}}
        lora = {"class_path": "LoRAAdjust", "init_args": {"rank": cell.lora_rank}}
        callbacks = [c for c, wanted in ((replay, cell.replay_rate), (lora, cell.lora_rank)) if wanted]
        name = f"batch_{cell.batch_size}_rate_{cell.replay_rate:g}_lora_{cell.lora_rank or 'none'}"
        return Case(name, {"data.batch_size": cell.batch_size}, callbacks)

    def labels(self, edits: int) -> dict[str, Any]:
        """Columns of its rows."""
        return {
            "batch_size": self.batch_size,
            "replay_rate": self.replay_rate,
            "lora_rank": self.lora_rank or "none",
            "replayed_a_batch": self.replayed(edits),
        }


MATRIX = tuple(Cell(batch, rate, rank) for rank in RANKS for rate in RATES for batch in BATCHES)


def cases(options: argparse.Namespace) -> list[Case]:
    """The runs of the cells that are asked for, each once; batches larger than all facts are none."""
    chosen = [
        cell.case(options.edits)
        for cell in MATRIX
        if cell.batch_size in options.batches and cell.replay_rate in options.rates and cell.lora_rank in options.ranks
        if cell.batch_size <= options.edits
    ]
    return list({case.name: case for case in chosen}.values())


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each cell of the whole matrix and each seed, run or not; what an earlier table has of it stays."""
    path = options.out / "results" / TABLE
    table = read_rows(path) if path.exists() else []
    earlier = {tuple(row[name] for name in KEY): row for row in table if row["status"] == "done"}
    seeds = sorted({*SEEDS, *options.seeds, *(int(row["seed"]) for row in earlier.values())})
    everything = argparse.Namespace(**{**vars(options), "only": None, "seeds": seeds})
    runs = {
        (run.case.name, run.seed): run
        for run in planned([cell.case(options.edits) for cell in MATRIX], RECIPE, everything)
    }
    found = []
    for cell in MATRIX:
        for seed in seeds:
            run = runs[cell.case(options.edits).name, seed]
            row: dict[str, Any] = {"case": run.case.name, **cell.labels(options.edits), "seed": seed}
            row["status"] = "not run" if run.status == "to run" else run.status
            if run.summary is not None:
                row |= table_rows([run])[0] | {"seconds": round(run.summary["seconds"], 1)}
            else:
                row = earlier.get(tuple(str(row[name]) for name in KEY), row)
            found.append(row)
    return found


@in_a_sentence
def main() -> None:
    """Runs what is missing; writes the table."""
    shared = parser(__doc__, work=ROOT / "lightning_logs" / "batch_experiments", edits=1024)
    add_texts(shared)
    for name, values in (("batches", BATCHES), ("rates", RATES), ("ranks", RANKS)):
        kind = type(values[0])
        shared.add_argument(f"--{name}", type=kind, nargs="+", choices=values, default=values, help="of the matrix")
    options = shared.parse_args()
    common = {**common_flags(options), "model.evaluation.matmul": "bfloat16"}
    wanted = [case.over(common) for case in cases(options)]
    runs = planned(wanted, RECIPE, options)
    run_all(runs, options, at_hand(wanted, RECIPE, options))
    if not options.dry_run:
        write_rows(rows(options), options.out / "results" / TABLE)
    exit_where_failed(runs, options)


if __name__ == "__main__":
    main()
