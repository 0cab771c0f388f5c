"""``editlab compare``: shows several runs in one table and one figure, made from their logs."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.errors import UserError
from editlab.metrics.names import PERPLEXITY, RETAINED, full_name
from editlab.runs.figures import LINES, comparison_figure, save_figure
from editlab.runs.folders import BEST, MEASURES, Group, differing, find_runs, group_runs
from editlab.runs.tables import Table
from editlab.utils.files import atomic_file

log = logging.getLogger(__name__)

_PERPLEXITY = full_name(RETAINED, PERPLEXITY)
_WIDEST = 24
"""Maximum number of characters of a setting's value in the terminal."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="Folders of runs, or folders that contain runs.")
    parser.add_argument("--csv", help="File for the table with one row per run; its name ends in .csv.")
    parser.add_argument(
        "--figure",
        help="File for the curves over the number of edits; its name ends in .png, and a .pdf is written next to it.",
    )


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
    """Draws the curves over the number of edits, one line for each group.

    Raises:
        UserError: if there are more groups than lines that can be distinguished.
    """
    if len(groups) > len(LINES):
        raise UserError(f"A figure shows at most {len(LINES)} groups of runs, and these are {len(groups)}: name fewer.")
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {g.name: ([run.curve for run in g.runs], *line) for g, line in zip(groups, LINES, strict=False)}
    save_figure(comparison_figure(shown), path)


def render(groups: Sequence[Group], names: Sequence[str]) -> str:
    """A table with one row per group: the settings in which the groups differ, and their measures.

    The best value of a column has a star. Measures of several runs are their mean, with half the range in brackets.

    Args:
        groups: groups of runs.
        names: settings in which the runs differ.
    """
    measured = [group.measures() for group in groups]
    shown = [name for name in MEASURES if any(name in one for one in measured)]
    best = {
        name: BEST[name](one[name][0] for one in measured if name in one)
        for name in shown
        if name in BEST and len(groups) > 1
    }
    rows = []
    for group, one in zip(groups, measured, strict=True):
        label = group.name + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        label += f" [{group.unfinished} unfinished]" if group.unfinished else ""
        settings = [_text(group.runs[0].settings.get(key)) for key in names]
        rows.append([label, *settings, *(_cell(name, one.get(name), best.get(name)) for name in shown)])
    header = ["run", *map(_last_parts, names), *(re.sub(r"([/_])", r"\1\n", name) for name in shown)]
    return f"\n{Table(header, rows, numbers=range(1 + len(names), len(header))).to_text()}\n"


def _last_parts(name: str) -> str:
    """The last two parts of a setting's dotted name."""
    return ".".join(name.split(".")[-2:])


def _text(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _cell(name: str, found: tuple[float, float, float] | None, best: float | None) -> str:
    if found is None:
        return ""
    value, low, high = found
    digits = {"edits": 0, "seconds": 0, _PERPLEXITY: 2}.get(name, 3)
    text = f"{value:.{digits}f}" + (f" [{(high - low) / 2:.{digits}f}]" if high > low else "")
    return text + ("*" if best is not None and value == best else " " if name in BEST else "")


def write(groups: Sequence[Group], names: Sequence[str], path: Path) -> None:
    """Writes one row per run: folder, seed, settings in which runs differ, and measures; absent values are empty."""
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


COMMAND = Command("compare", "Compare several runs in one table and one figure.", _add_arguments, _compare)
