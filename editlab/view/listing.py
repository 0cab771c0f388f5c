"""The runs in a folder and the state of each, read while other processes write them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from editlab.errors import UserError
from editlab.metrics.names import IMMEDIATE, RETAINED, full_name
from editlab.runs.folder_lock import NAME as LOCK
from editlab.runs.folder_lock import is_locked
from editlab.runs.folders import CONFIG, SUMMARY, TABLE, RunFolder, measured_folders
from editlab.runs.tables import Table

RUNNING, FINISHED, KILLED, UNKNOWN, DAMAGED = "running", "finished", "killed", "unknown", "damaged"

STATES = {
    RUNNING: "a process is writing into the run's folder",
    FINISHED: "the run has a summary.json",
    KILLED: "the run ended before its last batch, by a kill, an interrupt or an error (--ckpt_path last resumes it)",
    UNKNOWN: "the run has no summary.json, and its lock cannot be read from here",
    DAMAGED: "a file of the run cannot be read",
}
"""State of a run -> what it means."""

_SHOWN = {
    "accuracy after its step": full_name(IMMEDIATE, "accuracy"),
    "accuracy now": full_name(RETAINED, "accuracy"),
    "ES now": full_name(RETAINED, "ES"),
    "NS now": full_name(RETAINED, "NS"),
    "perplexity now": full_name(RETAINED, "perplexity"),
}
"""Column of the list of runs -> the metric in it."""


@dataclass(frozen=True)
class ListedRun:
    """A run as the list shows it."""

    name: str
    """its folder, relative to the folder of all runs"""
    path: Path
    state: str
    """one of :data:`STATES`"""
    edits: int | None = None
    """number of facts that have gone through a step"""
    metrics: dict[str, float] = field(default_factory=dict)
    """``group/metric`` -> value at the end, or at the last point where it was measured"""
    changed: float = 0.0
    """time of the last change of its summary or tables, in seconds since 1970"""
    problem: str = ""
    """for a damaged run, what is wrong with it"""


def require_runs(folder: str) -> Path:
    """The folder of all runs.

    Raises:
        UserError: There is no such folder, or no run in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"There is no folder {folder!r}: name the folder of your runs, such as lightning_logs.")
    if not _folders(root):
        raise UserError(f"{folder} has no run in it: start one with editlab fit, or name the folder of your runs.")
    return root


def list_runs(root: Path) -> list[ListedRun]:
    """The runs in ``root`` and below it; those that are running come first, and then the last changed."""
    found = [run_in(folder, root) for folder in _folders(root)]
    return sorted(found, key=lambda run: (run.state != RUNNING, -run.changed, run.name))


def _folders(root: Path) -> list[Path]:
    """Folders with a summary or a table, and those that are locked: a run of the first minute has no table yet."""
    started = (file.parent for file in root.rglob(LOCK) if (file.parent / CONFIG).is_file() and is_locked(file.parent))
    return sorted({*measured_folders(root), *started})


def run_in(folder: Path, root: Path) -> ListedRun:
    """The run in a folder, as the list of the runs in ``root`` shows it."""
    name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
    files = [file.stat() if file.exists() else None for file in map(folder.joinpath, _WATCHED)]
    stamps = tuple((file.st_mtime_ns, file.st_size) if file else (0, 0) for file in files)
    changed = max(written for written, _ in stamps) / 1e9
    try:
        edits, metrics = _measured(folder, stamps)
    except UserError as error:
        return ListedRun(name, folder, DAMAGED, changed=changed, problem=str(error))
    locked = is_locked(folder)
    ended = FINISHED if (folder / SUMMARY).exists() else UNKNOWN if locked is None else KILLED
    return ListedRun(name, folder, RUNNING if locked else ended, edits, metrics, changed)


_WATCHED = (CONFIG, TABLE, SUMMARY)


@lru_cache(maxsize=1024)
def _measured(folder: Path, stamps: tuple[tuple[int, int], ...]) -> tuple[int | None, dict[str, float]]:
    """Number of edits, and each metric at the last point where it was measured; those of a summary take precedence.

    A folder of many runs is read every few seconds, so each file is read again only when its stamp has changed.
    """
    run = RunFolder(folder)
    found = {name: value for _, row in sorted(run.curve.items()) for name, value in row.items()}
    if run.summary is not None:
        found |= {name: value for name, value in run.summary["metrics"].items() if value is not None}
    return max(run.curve, default=None), found


def runs_table(runs: Sequence[ListedRun], now: float | None = None) -> Table:
    """The list of runs as a table; columns without any value are left out.

    Args:
        runs: the runs.
        now: the present time in seconds since 1970; default: the clock's.
    """
    now = time.time() if now is None else now
    rows = []
    for run in runs:
        values = (run.metrics.get(metric) for metric in _SHOWN.values())
        numbers = ["" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values]
        edits = "" if run.edits is None else str(run.edits)
        rows.append([run.name, run.state, edits, *numbers, f"{_ago(now - run.changed)} ago" if run.changed else ""])
    header = ["run", "state", "edits", *_SHOWN, "changed"]
    classes = {(n, 1): {FINISHED: "", RUNNING: "running"}.get(run.state, "stopped") for n, run in enumerate(runs)}
    return Table(header, rows, range(2, len(header) - 1), classes).without_empty()


def _ago(seconds: float) -> str:
    """A duration in its largest unit.

    >>> [_ago(seconds) for seconds in (0.2, 59, 120, 7300, 200000)]
    ['0 s', '59 s', '2 min', '2 h', '2 days']
    """
    for size, unit in ((2 * 86400, "days"), (2 * 3600, "h"), (2 * 60, "min")):
        if seconds >= size:
            return f"{seconds / (size / 2):.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def states_of(runs: Iterable[ListedRun]) -> dict[str, str]:
    """State of a run -> what it means, for the states that these runs have."""
    present = {run.state for run in runs}
    return {state: meaning for state, meaning in STATES.items() if state in present}
