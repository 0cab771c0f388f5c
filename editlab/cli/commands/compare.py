"""``editlab compare``: several runs in one table and one figure, from what they logged."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.errors import UserError
from editlab.runs.figures import LINES, comparison_figure, save_figure
from editlab.runs.folders import BEST, MEASURES, Group, differing, find_runs, group_runs
from editlab.utils.files import atomic_file

log = logging.getLogger(__name__)

_WIDEST = 24
"""Characters of a setting's value that the terminal shows."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="Folders of runs, or folders with runs in them.")
    parser.add_argument("--csv", help="File for the table, with a row a run.")
    parser.add_argument("--figure", help="File for the curves over edits, .png; a .pdf comes beside it.")


def _compare(given: Namespace) -> None:
    for name, suffix in (("csv", ".csv"), ("figure", ".png")):
        if given[name] is not None and Path(given[name]).suffix.lower() != suffix:
            raise UserError(f"--{name} is {given[name]}: its name must end in {suffix}.")
    runs = find_runs(given.runs)
    groups, names = group_runs(runs), differing(run.settings for run in runs)
    log.info("%s", render(groups, names))
    if given.csv is not None:
        write(groups, names, Path(given.csv))
        log.info("table   %s", given.csv)
    if given.figure is not None:
        draw(groups, Path(given.figure))
        log.info("figure  %s", given.figure)


def draw(groups: Sequence[Group], path: Path) -> None:
    """The curves over edits, a line a group.

    Raises:
        UserError: where there are more groups than lines that can be told apart.
    """
    if len(groups) > len(LINES):
        raise UserError(f"A figure shows at most {len(LINES)} groups of runs, and these are {len(groups)}: name fewer.")
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {g.name: ([run.curve for run in g.runs], *line) for g, line in zip(groups, LINES, strict=False)}
    save_figure(comparison_figure(shown), path)


def render(groups: Sequence[Group], names: Sequence[str]) -> str:
    """A row a group: what sets it apart, and its measures; the best of each is marked with a star.

    Several runs' measures are their mean and, in brackets, half the range.
    """
    measured = [group.measures() for group in groups]
    shown = [name for name in MEASURES if any(name in one for one in measured)]
    best = {
        name: BEST[name](one[name][0] for one in measured if name in one)
        for name in shown
        if name in BEST and len(groups) > 1
    }
    rows = [["run", *map(_last_parts, names), *shown]]
    for group, one in zip(groups, measured, strict=True):
        name = group.name + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        name += f" [{group.unfinished} unfinished]" if group.unfinished else ""
        settings = [_text(group.runs[0].settings.get(key)) for key in names]
        rows.append([name, *settings, *(_cell(m, one.get(m), best.get(m)) for m in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = 1 + len(names)
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(["", *(line.rstrip() for line in lines), ""])


def _last_parts(name: str) -> str:
    """A setting's name, as far as it tells it apart."""
    return ".".join(name.split(".")[-2:])


def _text(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _cell(name: str, found: tuple[float, float, float] | None, best: float | None) -> str:
    if found is None:
        return "-"
    value, low, high = found
    digits = {"edits": 0, "seconds": 0, "perplexity": 2}.get(name, 3)
    text = f"{value:.{digits}f}" + (f" [{(high - low) / 2:.{digits}f}]" if high > low else "")
    return text + ("*" if best is not None and value == best else " " if name in BEST else "")


def write(groups: Sequence[Group], names: Sequence[str], path: Path) -> None:
    """A row a run: its folder, seed, the settings in which runs differ, and its measures; what is absent is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "folder", "finished", "seed", *names, *MEASURES])
        for group in groups:
            for run in group.runs:
                measured = run.measures()
                writer.writerow(
                    [group.name, run.path, run.summary is not None, run.settings.get("data.seed", "")]
                    + ["" if run.settings.get(name) is None else run.settings[name] for name in names]
                    + [round(measured[name], 6) if name in measured else "" for name in MEASURES]
                )


COMMAND = Command(
    "compare", "Several runs in one table and one figure, from what they logged.", _add_arguments, _compare
)
