"""``editlab compare``: shows several runs in one table and one figure, made from their logs."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.errors import UserError
from editlab.metrics.names import GROUPS, PERPLEXITY, RETAINED, full_name
from editlab.runs.figures import LINES, comparison_figure, save_figure
from editlab.runs.folders import BEST, MEASURES, Group, differing, find_runs, group_runs
from editlab.runs.tables import Table
from editlab.utils.csv_cells import defused
from editlab.utils.files import atomic_file

log = logging.getLogger(__name__)

_PERPLEXITY = full_name(RETAINED, PERPLEXITY)
EXPLANATIONS = {
    "ES": "fraction of edit prompts on which the new target is likelier than the true one",
    "PS": "the same on paraphrases",
    "NS": "fraction of neighbor prompts on which the true answer is still likelier than the new target",
    "accuracy": "fraction of edits whose target is the argmax at every token",
    "paraphrase_accuracy": "the same on paraphrases",
    "neighbor_accuracy": "fraction of neighbor prompts whose true answer is the argmax at every token",
    "generation": "fraction of edit prompts whose free continuation contains the target",
    "bystander_accuracy": "fraction of facts about other subjects whose truth is the argmax at every token",
    "bystander_generation": "fraction of these whose free continuation contains the truth",
    "perplexity": "perplexity of the held-out text; lower is better",
    "perplexity_ratio": "that perplexity divided by the unedited model's; lower is better",
    "edits": "number of facts that were edited and kept",
    "seconds": "duration of the run",
}
"""Last part of a column's name -> what the column shows."""

ALIKE = {
    "perplexity_ratio": ("model.language_model", "model.evaluation.heldout", "model.evaluation.heldout_tokens"),
    full_name(RETAINED, "generation"): ("data.path", "model.evaluation.generation"),
    full_name(RETAINED, "bystander_accuracy"): ("data.path", "model.evaluation.bystanders"),
    full_name(RETAINED, "bystander_generation"): ("data.path", "model.evaluation.bystanders"),
    full_name(RETAINED, "NS"): ("data.path", "model.evaluation.neighbors"),
    full_name(RETAINED, "neighbor_accuracy"): ("data.path", "model.evaluation.neighbors"),
}
"""Column -> settings that must agree among runs whose values are ranked; the other columns need :data:`FACTS`."""

FACTS = ("data.path",)

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

    The best value of a column has a star if the groups can be ranked by it: they have the same number of edits, and
    were measured on the same texts. Measures of several runs are their mean, with half the range in brackets. Below the
    table is a line for each column.

    Args:
        groups: groups of runs.
        names: settings in which the runs differ.
    """
    measured = [group.measures() for group in groups]
    shown = [name for name in MEASURES if any(name in one for one in measured)]
    best = {
        name: BEST[name](one[name][0] for one in measured if name in one)
        for name in shown
        if name in BEST and len(groups) > 1 and not _unlike(groups, measured, name)
    }
    unlike = [why for name in shown if name in BEST and len(groups) > 1 and (why := _unlike(groups, measured, name))]
    rows = []
    for group, one in zip(groups, measured, strict=True):
        label = group.name + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        label += f" [{group.unfinished} unfinished]" if group.unfinished else ""
        settings = [_text(group.runs[0].settings.get(key)) for key in names]
        rows.append([label, *settings, *(_cell(name, one.get(name), best.get(name)) for name in shown)])
    header = ["run", *map(_last_parts, names), *(re.sub(r"([/_])", r"\1\n", name) for name in shown)]
    table = Table(header, rows, numbers=range(1 + len(names), len(header))).to_text()
    return "\n".join(["", table, "", *_explained(shown, bool(best), unlike, groups), ""])


def _unlike(groups: Sequence[Group], measured: Sequence[Mapping[str, tuple[float, ...]]], column: str) -> str:
    """Return why groups of runs cannot be ranked by a column; "" if they can."""
    if len({one["edits"] for one in measured if "edits" in one}) > 1:
        return "numbers of edits"
    for setting in ALIKE.get(column, FACTS):
        values = {json.dumps(run.settings[setting]) for g in groups for run in g.runs if setting in run.settings}
        if len(values) > 1:
            return setting
    return ""


def _explained(shown: Sequence[str], starred: bool, unlike: Sequence[str], groups: Sequence[Group]) -> Iterator[str]:
    """Yield the lines below a table: what its columns, brackets and stars mean, and why some have no star."""
    used = dict.fromkeys(group for name in shown if (group := name.partition("/")[0]) in GROUPS)
    for group in used:
        yield f"{group + '/':22}measured on {GROUPS[group]}"
    for name in dict.fromkeys(name.rpartition("/")[2] for name in shown):
        yield f"{name:22}{EXPLANATIONS[name]}"
    if any(len(group.runs) > 1 for group in groups):
        yield f"{'[0.012]':22}half the range over the runs of a group, which differ by their seeds only"
    if starred:
        yield f"{'*':22}best value of the column"
    for why in dict.fromkeys(unlike):
        yield f"{'no *':22}the runs have different {why if why.startswith('numbers') else f'values of {why}'}"


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
        writer.writerow(["group", "folder", "finished", "seed", *map(defused, names), *MEASURES])
        for group in groups:
            for run in group.runs:
                measured = run.measures()
                writer.writerow(
                    [defused(group.name), defused(str(run.path)), run.summary is not None]
                    + [
                        defused("" if (value := run.settings.get(name)) is None else value)
                        for name in ("data.seed", *names)
                    ]
                    + [round(measured[name], 6) if name in measured else "" for name in MEASURES]
                )


COMMAND = Command("compare", "Compare several runs in one table and one figure.", _add_arguments, _compare)
