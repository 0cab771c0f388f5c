"""Draws the figures of an experiment from its tables in ``results/``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from editlab.experiments.csv_files import Row, read_rows
from editlab.experiments.figure_spec import (
    BarsSpec,
    CurvesSpec,
    FigureSpec,
    FrontierSpec,
    HeatMapSpec,
    LineSpec,
    LinesSpec,
    RadarSpec,
    RunsFigureSpec,
)
from editlab.experiments.figures import (
    bars_figure,
    frontier_figure,
    heat_figure,
    lines_figure,
    radar_figure,
    roc_figure,
)
from editlab.experiments.plan import Run, load_function
from editlab.experiments.spec import Experiment
from editlab.experiments.tables import SNAPSHOT
from editlab.runs.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    comparison_figure,
    save_figure,
)

log = logging.getLogger(__name__)

COLORS = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "vermilion": VERMILION, "purple": PURPLE, "sky": SKY,
          "black": BLACK}  # fmt: skip


def draw_all(experiment: Experiment, out: Path, runs: Sequence[Run] = ()) -> None:
    """Draws every figure of an experiment whose table, or whose runs, exist.

    Args:
        experiment: its figures.
        out: folder that ``results/`` and ``figs/`` lie in.
        runs: finished ones, for figures that are drawn from runs.
    """
    for spec in experiment.figures:
        figure = draw_from_runs(spec, runs) if isinstance(spec, RunsFigureSpec) else draw_from_table(spec, out)
        if isinstance(figure, Figure):
            save_figure(figure, out / "figs" / f"{spec.file}.png")
            log.info("figs/%s.png and .pdf", spec.file)


def draw_from_runs(spec: RunsFigureSpec, runs: Sequence[Run]) -> Figure | None:
    """The figure that a function draws from finished runs; None without any."""
    figure: Figure | None = load_function(spec.draw)(runs) if runs else None
    return figure


def draw_from_table(spec: FigureSpec, out: Path) -> Figure | str:
    """A figure of one table, or the reason why there is none."""
    assert not isinstance(spec, RunsFigureSpec)
    path = out / "results" / spec.table
    if not path.exists():
        return f"there is no results/{spec.table}"
    rows = [{**row, **_derived(row)} for row in read_rows(path)]
    figure = _draw(spec, rows)
    return figure if figure is not None else f"results/{spec.table} has nothing to draw yet"


def _draw(spec: FigureSpec, rows: Sequence[Row]) -> Figure | None:
    """The figure; None if no row belongs in it."""
    if isinstance(spec, CurvesSpec):
        return curves_figure(rows, spec.rows)
    if isinstance(spec, LinesSpec):
        return _lines(spec, chosen(rows, spec.where))
    if isinstance(spec, HeatMapSpec):
        cells = chosen(rows, spec.where)
        return heat_figure(cells, spec.x, spec.y, spec.panels, (spec.xlabel, spec.ylabel)) if cells else None
    if isinstance(spec, BarsSpec):
        groups = {label: chosen(rows, {"case": case}) for case, label in spec.cases.items()}
        return bars_figure(groups, spec.panels) if any(groups.values()) else None
    if isinstance(spec, FrontierSpec):
        families = {
            label: {name: chosen(rows, {"case": case}) for case, name in points.items()}
            for label, points in spec.families.items()
        }
        found = any(some for points in families.values() for some in points.values())
        return frontier_figure(families, spec.x, spec.panels, spec.xlabel) if found else None
    if isinstance(spec, RadarSpec):
        return _radar(spec, rows)
    return roc_figure(rows) if rows else None


def chosen(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """Rows with the given values in the given columns."""
    return [row for row in rows if all(str(row.get(name)) == str(value) for name, value in where.items())]


def _derived(row: Row) -> Row:
    """Perplexity before over after, and its rise in percent, if it was measured."""
    if "perplexity_ratio" not in row:
        return {}
    ratio = float(row["perplexity_ratio"])
    return {"perplexity_kept": 1 / ratio, "perplexity_rise": 100 * (ratio - 1)}


def curves_figure(rows: Sequence[Row], shown: Sequence[Mapping[str, LineSpec]]) -> Figure | None:
    """Retained ES, accuracy, NS and perplexity over edits; bands are the range over seeds.

    Args:
        rows: of :func:`editlab.experiments.tables.rows_of_snapshots`.
        shown: of each row of panels: case -> its line.

    Returns:
        None if no row is of a case that is shown.
    """
    curves: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for row in rows:
        point = {name: float(row[name]) for name in SNAPSHOT if name in row}
        curves.setdefault(row["case"], {}).setdefault(int(row["seed"]), {})[int(row["edits"])] = point
    drawn = [
        {
            line.label: (list(curves[case].values()), COLORS[line.color], line.line)
            for case, line in panels.items()
            if case in curves
        }
        for panels in shown
    ]
    return comparison_figure(*filter(None, drawn)) if any(drawn) else None


def _lines(spec: LinesSpec, rows: Sequence[Row]) -> Figure | None:
    values = sorted({row[spec.group] for row in rows if spec.group in row}, key=_as_number)
    groups = {spec.label.format(value): chosen(rows, {spec.group: value}) for value in values}
    return lines_figure(groups, spec.x, spec.panels, spec.xlabel) if groups else None


def _as_number(text: str) -> tuple[float, str]:
    """A key that sorts numbers as such, and before words."""
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _radar(spec: RadarSpec, rows: Sequence[Row]) -> Figure | None:
    panels: dict[str, dict[str, list[Row]]] = {}
    for panel in spec.panels:
        groups = panels.setdefault(panel.title, {})
        for row in chosen(rows, panel.where):
            label = _label(spec.label, row)
            if label is not None:
                groups.setdefault(label, []).append({k.removeprefix(f"{panel.metrics}/"): v for k, v in row.items()})
    return radar_figure(panels, spec.spokes) if any(panels.values()) else None


def _label(pattern: str, row: Row) -> str | None:
    """A row's label; None if it lacks a column of the pattern."""
    typed = {name: _number_or_text(value) for name, value in row.items()}
    try:
        return pattern.format_map(typed)
    except (KeyError, ValueError):
        return None


def _number_or_text(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value
