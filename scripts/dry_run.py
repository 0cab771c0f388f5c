"""What a dry run says: the runs that are asked for, and how long those that are missing will take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweep import Case, Run

Formula = Callable[["Case"], float]
"""Seconds that a case takes, from its settings."""

START_UP = 10.0
"""Seconds before a run's clock starts: imports and loading the model."""


def expected(run: Run, done: Sequence[Run], formula: Formula | None) -> float | None:
    """Seconds that a run will take.

    Args:
        run: the missing one.
        done: finished runs of the same experiment. Those of the same case stand for it; the others say by how much
            the formula is wrong on this machine, or stand for it where there is none.
        formula: seconds from settings.

    Returns:
        None where there is nothing to tell from.
    """
    measured = [(other.case, START_UP + (other.summary or {})["seconds"]) for other in done]
    same = [seconds for case, seconds in measured if case.name == run.case.name]
    if same:
        return statistics.mean(same)
    if formula is not None:
        ratios = [seconds / formula(case) for case, seconds in measured]
        return formula(run.case) * (statistics.median(ratios) if ratios else 1.0)
    return statistics.mean(seconds for _, seconds in measured) if measured else None


def show(runs: Sequence[Run], formula: Formula | None, workers: int) -> None:
    """Prints a line for each run, and the time of what is missing.

    Args:
        runs: all that are asked for.
        formula: seconds of a case.
        workers: runs at a time.
    """
    done = [run for run in runs if run.summary is not None]
    missing = [(run, expected(run, done, formula)) for run in runs if run.summary is None]
    for run in done:
        print(f"{run.status:7} {run.case.name}, seed {run.seed}")
    for run, seconds in missing:
        print(f"{run.status:7} {run.case.name}, seed {run.seed}" + (f", about {_spoken(seconds)}" if seconds else ""))
    source = f"measured on {len(done)} finished runs" if done else "by the script's formula; no run is finished"
    total = [seconds for _, seconds in missing if seconds is not None]
    time = f"about {_spoken(sum(total) / workers)}, {workers} at a time ({source})" if total else "no estimate"
    print(f"{len(missing)} of {len(runs)} runs are to be made: {time if missing else 'nothing to wait for'}")


def _spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
