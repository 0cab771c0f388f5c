"""What ``--dry-run`` shows: the runs that are asked for, and how long the missing ones will take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from editlab.errors import UserError
from editlab.experiments.plan import Case, Run

START_UP = 10.0
"""Seconds before a run's clock starts: imports and loading the model."""


def formula(case: Case) -> float:
    """Seconds of a case, estimated from measurements with the built-in model on one core of a server's CPU.

    Runs of 8 and 32 facts took 41 s, 0.33 s a fact and 0.32 s a batch; 60 steps of LoRA about 200 s. Values take 1 to
    2 s a fact. They count here if every run computes its own; values of the original weights come on top, once for all
    cases of a seed. Replay made no measurable difference; trust and curves are left out.

    Raises:
        UserError: if the number of facts, or of facts in a batch, is no number.
    """
    edits, batch_size = (_count(case, name) for name in ("data.limit", "data.batch_size"))
    values = 1.5 * edits if case.flags.get("model.values.reference") == "current" else 0.0
    batches = math.ceil(edits / batch_size)
    steps = 0
    for callback in case.callbacks:
        if callback["class_path"].endswith("LoRAAdjust"):
            settings = callback.get("init_args", {})
            every = settings.get("every_n_batches")
            steps += settings.get("steps", 60) * (math.ceil(batches / every) if every else 1)
    return 41 + 0.33 * edits + 0.32 * batches + values + 200 / 60 * steps


def _count(case: Case, name: str) -> int:
    """A whole number among a case's settings, which the command line gives as text."""
    if name not in case.flags:
        option = {"data.limit": "edits", "data.batch_size": "batch_size"}[name]
        raise UserError(f"--dry-run needs the number {name}: set {option} in the experiment's file, or --{option}.")
    try:
        return max(1, int(case.flags[name]))
    except ValueError:
        raise UserError(f"--dry-run needs a number for {name}, and it is {case.flags[name]}: give one.") from None


def expected(run: Run, done: Sequence[Run]) -> float:
    """Seconds that a run will take.

    Args:
        run: the missing one.
        done: finished runs of the same experiment. The mean of those of the same case is taken; if there is none, the
            formula times the median ratio of measured and computed times on this machine.
    """
    measured = [(other.case, START_UP + (other.summary or {})["seconds"]) for other in done]
    same = [seconds for case, seconds in measured if case.name == run.case.name]
    if same:
        return statistics.mean(same)
    ratios = [seconds / formula(case) for case, seconds in measured]
    return formula(run.case) * (statistics.median(ratios) if ratios else 1.0)


def report(runs: Sequence[Run], workers: int, known: Sequence[Run] = ()) -> str:
    """A line for each run, and the total time of the missing ones.

    Args:
        runs: all that are asked for.
        workers: runs at a time.
        known: finished runs of the same experiment, asked for or not; times are measured on them.
    """
    done = list({run.folder: run for run in (*known, *runs) if run.summary is not None}.values())
    missing = [(run, expected(run, done)) for run in runs if run.summary is None]
    lines = [f"{run.status:7} {run.case.name}, seed {run.seed}" for run in runs if run.summary is not None]
    lines += [
        f"{run.status:7} {run.case.name}, seed {run.seed}, about {_duration(seconds)}" for run, seconds in missing
    ]
    source = f"measured on {len(done)} finished runs" if done else "by a formula: no run is finished"
    times = [seconds for _, seconds in missing]
    total = _duration(max(sum(times) / workers, *times)) if times else ""
    time = f"about {total}, {workers} at a time ({source})" if missing else "no time"
    return "\n".join([*lines, f"{len(missing)} of {len(runs)} runs are missing and take {time}."])


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
