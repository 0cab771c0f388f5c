"""Time that replay adds to a step: the same batches without and with it, in turn, values included.

    python scripts/benchmark_replay.py --rate 0.3

Values are found on the current weights in both; the weights are put back between the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, cast

from callbacks import MemoryReplay
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.evaluation.scoring import prefers_truth

TRAINER = cast(Any, None)
"""Placeholder for the Trainer, which MemoryReplay does not use."""


def step(editor: SequentialEditor, replay: MemoryReplay, number: int, facts: Any) -> tuple[float, EditOutcome]:
    """Edits one batch as the editor does, up to the verdict; returns its duration in seconds and its outcome."""
    start = time.perf_counter()
    plan = EditPlan(number, facts, editor.targets.find(facts))
    replay.on_edit_planned(TRAINER, editor, plan)
    outcome = EditOutcome(plan)
    editor.solver.solve(outcome)
    replay.on_edit_settled(TRAINER, editor, outcome)
    return time.perf_counter() - start, outcome


def main() -> None:
    """Runs the comparison and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="pairs of steps that are timed")
    parser.add_argument("--sampling", default="random")
    arguments = parser.parse_args()

    editor = SequentialEditor()
    editor.configure_model()
    editor.prepare_solver()
    data = EditDataModule(limit=arguments.batch_size * (arguments.batches + 1))
    data.setup()
    data.select(lambda facts: prefers_truth(editor.lm, facts, editor.unedited_scores))
    with_replay = MemoryReplay(rate=arguments.rate, sampling=arguments.sampling)
    without = MemoryReplay(rate=0.0)

    ratios = []
    for number, facts in enumerate(batch.facts for batch in data.train_dataloader()):
        totals = [layer.total.clone() for layer in editor.layers]
        plain, _ = step(editor, without, number, facts)
        for layer, total in zip(editor.layers, totals, strict=True):
            layer.restore(total)
        replayed, outcome = step(editor, with_replay, number, facts)
        if number:  # the first fills the buffer and warms up
            ratios.append(replayed / plain)
            print(
                f"{len(facts)} facts: {plain:.1f} s without, {replayed:.1f} s with "
                f"{len(outcome.plan.additions)} replayed: {ratios[-1] - 1:+.1%}",
                flush=True,
            )
    print(f"median {statistics.median(ratios) - 1:+.1%}")


if __name__ == "__main__":
    main()
