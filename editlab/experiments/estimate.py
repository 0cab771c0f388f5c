"""What a dry run says: the runs that are asked for, and how long those that are missing will take."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweep import Case, Run

START_UP = 10.0
"""Seconds before a run's clock starts: imports and loading the model."""


def formula(case: Case) -> float:
    """Seconds of a case, by what was measured with the built-in model on one core of a server's CPU.

    Fits of 8 and 32 facts took 41 s, 0.33 s a fact and 0.32 s a batch; 60 steps of LoRA about 200 s. Values take 1 to
    2 s a fact. They are counted here where every run finds its own; those of the original weights come on top, once for
    all cases of a seed. Replay made no difference that showed; what trust and curves take is left out.
    """
    edits, batch_size = (_count(case, name) for name in ("data.limit", "data.batch_size"))
    values = 1.5 * edits if case.flags.get("model.values.reference") == "current" else 0.0
    batches = math.ceil(edits / batch_size)
    trained = 0
    for callback in case.callbacks:
        if callback["class_path"].endswith("LoRAAdjust"):
            settings = callback.get("init_args", {})
            every = settings.get("every_n_batches")
            trained += settings.get("steps", 60) * (math.ceil(batches / every) if every else 1)
    return 41 + 0.33 * edits + 0.32 * batches + values + 200 / 60 * trained


def _count(case: Case, name: str) -> int:
    """A number among a case's flags, which the command line gives as a word; exits with a sentence where it is none."""
    try:
        return max(1, int(case.flags[name]))
    except ValueError:
        sys.exit(f"--dry-run needs a number for {name}, and it is {case.flags[name]}.")


def expected(run: Run, done: Sequence[Run]) -> float:
    """Seconds that a run will take.

    Args:
        run: the missing one.
        done: finished runs of the same experiment. Those of the same case stand for it; the others say by how much
            the formula is wrong on this machine.
    """
    measured = [(other.case, START_UP + (other.summary or {})["seconds"]) for other in done]
    same = [seconds for case, seconds in measured if case.name == run.case.name]
    if same:
        return statistics.mean(same)
    ratios = [seconds / formula(case) for case, seconds in measured]
    return formula(run.case) * (statistics.median(ratios) if ratios else 1.0)


def show(runs: Sequence[Run], workers: int, known: Sequence[Run] = ()) -> None:
    """Prints a line for each run, and the time of what is missing.

    Args:
        runs: all that are asked for.
        workers: runs at a time.
        known: finished runs of the same experiment, asked for or not; times are measured on them.
    """
    done = list({run.folder: run for run in (*known, *runs) if run.summary is not None}.values())
    missing = [(run, expected(run, done)) for run in runs if run.summary is None]
    for run in runs:
        if run.summary is not None:
            print(f"{run.status:7} {run.case.name}, seed {run.seed}")
    for run, seconds in missing:
        print(f"{run.status:7} {run.case.name}, seed {run.seed}, about {_spoken(seconds)}")
    source = f"measured on {len(done)} finished runs" if done else "by a formula, no run is finished"
    times = [seconds for _, seconds in missing]
    total = _spoken(max(sum(times) / workers, *times)) if times else ""
    time = f"about {total}, {workers} at a time ({source})" if missing else "nothing to wait for"
    print(f"{len(missing)} of {len(runs)} runs are to be made: {time}")


def _spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
