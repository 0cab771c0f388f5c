"""Figures of whole experiments, drawn from rows of their tables: lines, heat maps, bars, radars, ROC curves.

A row is a mapping from column to number or text; a value that was not measured is absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from editlab.runs.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PRINT_WIDTH,
    PURPLE,
    SKY,
    VERMILION,
    draw_band,
    in_print,
    legend_below,
    printed_figure,
)

Row = Mapping[str, Any]

COLD_TO_WARM = "cividis"
"""A color map that is the same to color-blind readers, and falls evenly to gray in print."""

HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo")
"""Patterns of bars, so that they can be distinguished in gray too."""

STYLES: tuple[tuple[str, Any], ...] = (
    (BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (VERMILION, ":"), (PURPLE, (0, (6, 1, 1, 1, 1, 1))),
    (SKY, (0, (1, 0.5))), (BLACK, (0, (8, 3))),
)  # fmt: skip
"""Color and line of the first group, the second, ...: distinguishable in gray too."""


def values_of(rows: Sequence[Row], column: str) -> list[float]:
    """Values of a column, of the rows that have it."""
    return [float(row[column]) for row in rows if column in row]


@in_print
def lines_figure(
    groups: Mapping[str, Sequence[Row]], x: str, panels: Mapping[str, str], xlabel: str, repeat: str = "seed"
) -> Figure:
    """One panel for each column, one line for each group over ``x`` (in powers of two); bands are ranges over seeds.

    Args:
        groups: label -> rows.
        x: column of the abscissa, whole numbers.
        panels: column -> title.
        xlabel: label of the abscissa.
        repeat: column that distinguishes the runs of a band.
    """
    figure, axes = printed_figure(len(panels), height=2.6)
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for (label, rows), (color, line) in zip(groups.items(), STYLES, strict=False):
            curves = [
                {int(row[x]): {column: float(row[column])} for row in rows if row[repeat] == one and column in row}
                for one in dict.fromkeys(row[repeat] for row in rows)
            ]
            draw_band(ax, curves, column, label=label, color=color, linestyle=line)
        ax.set_xscale("log", base=2)
        marks = sorted({int(row[x]) for rows in groups.values() for row in rows})
        ax.set_xticks(marks, map(str, marks), rotation=45)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(title=title, xlabel=xlabel)
    legend_below(figure)
    return figure


@in_print
def heat_figure(rows: Sequence[Row], x: str, y: str, panels: Mapping[str, str], labels: tuple[str, str]) -> Figure:
    """One heat map for each column: each cell shows the mean over its rows; cells without rows are empty.

    Args:
        rows: with whole or decimal numbers in ``x`` and ``y``.
        x: column of the cells from left to right.
        y: column of the cells from bottom to top.
        panels: column -> title.
        labels: of x and y.
    """
    across, up = (sorted({float(row[name]) for row in rows}) for name in (x, y))
    figure, axes = printed_figure(len(panels), height=0.35 * len(up) + 1.0, columns=2)
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        grid = [
            [values_of([r for r in rows if (float(r[x]), float(r[y])) == (a, b)], column) for a in across] for b in up
        ]
        shown = [[mean(some) if some else math.nan for some in line] for line in grid]
        known = [value for line in shown for value in line if not math.isnan(value)]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        ax.imshow(shown, cmap=COLD_TO_WARM, aspect="auto", origin="lower")
        for i, line in enumerate(shown):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    color = "white" if value < middle else BLACK
                    ax.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(across)), [f"{value:g}" for value in across])
        ax.set_yticks(range(len(up)), [f"{value:g}" for value in up])
        ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return figure


@in_print
def radar_figure(panels: Mapping[str, Mapping[str, Sequence[Row]]], measures: Mapping[str, str]) -> Figure:
    """One radar for each panel, one line for each group in it: means over its rows, from 0 at the center to 1.

    Args:
        panels: title -> label -> rows.
        measures: column -> name of its spoke. A panel shows the columns that its rows have, and leaves out groups that
            lack one of them.
    """
    labels = list(dict.fromkeys(label for groups in panels.values() for label in groups))
    style = dict(zip(labels, cycle(STYLES), strict=False))
    figure = Figure(figsize=(PRINT_WIDTH, 1.2 + 5.0 / max(2, len(panels))), layout="constrained")
    for ax, (title, groups) in zip(
        figure.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "polar"}).flat,
        panels.items(),
        strict=True,
    ):
        columns = [c for c in measures if any(c in row for rows in groups.values() for row in rows)]
        spokes = [2 * math.pi * i / len(columns) for i in range(len(columns))]
        for label, rows in groups.items():
            found = [values_of(rows, column) for column in columns]
            if columns and all(found):
                means = [mean(values) for values in found]
                color, line = style[label]
                ax.plot([*spokes, 0.0], [*means, means[0]], color=color, linestyle=line, label=label, linewidth=1.5)
        ax.set_theta_offset(math.pi / 2)
        ax.set_theta_direction(-1)
        ax.set_xticks(spokes, [measures[column] for column in columns])
        for mark, angle in zip(ax.get_xticklabels(), spokes, strict=True):
            side = round(math.sin(angle), 6)
            mark.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
        ax.set_ylim(0, 1)
        ax.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"], fontsize=7)
        ax.grid(alpha=0.4, linewidth=0.5)
        ax.set_title(title, y=1.12)
    legend_below(figure, columns=3)
    return figure


@in_print
def bars_figure(groups: Mapping[str, Sequence[Row]], panels: Mapping[str, str]) -> Figure:
    """One panel for each column, one bar for each group: the mean over its rows, with the range as a whisker.

    Args:
        groups: label -> rows.
        panels: column -> title.
    """
    figure, axes = printed_figure(len(panels))
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for index, ((label, rows), (color, _)) in enumerate(zip(groups.items(), STYLES, strict=False)):
            values = values_of(rows, column)
            if values:
                ax.bar(index, mean(values), color=color, width=0.75, label=label, edgecolor=BLACK, linewidth=0.5,
                       hatch=HATCHES[index % len(HATCHES)])  # fmt: skip
                ax.vlines(index, min(values), max(values), color=BLACK, linewidth=1.2)
        ax.set(title=title, xticks=[])
        ax.grid(False, axis="x")
        ax.set_axisbelow(True)
    legend_below(figure, columns=2)
    return figure


@in_print
def frontier_figure(
    families: Mapping[str, Mapping[str, Sequence[Row]]], x: str, panels: Mapping[str, str], xlabel: str
) -> Figure:
    """One panel for each column over ``x``; a line for each family, whose points are means over the rows of a setting.

    Args:
        families: label -> name of a point -> rows, in the order of the line; points without rows are left out.
        x: column of the abscissa.
        panels: column -> title.
        xlabel: label of the abscissa.
    """
    figure, axes = printed_figure(len(panels), height=2.6, columns=2)
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for (label, points), (color, line) in zip(families.items(), STYLES, strict=False):
            known = {name: rows for name, rows in points.items() if values_of(rows, x) and values_of(rows, column)}
            places = [(mean(values_of(rows, x)), mean(values_of(rows, column))) for rows in known.values()]
            ax.plot(
                [a for a, _ in places], [b for _, b in places], color=color, linestyle=line, marker="o", label=label
            )
            for name, place in zip(known, places, strict=True):
                ax.annotate(name, place, xytext=(3, 4), textcoords="offset points", fontsize=7, color=color)
        ax.set(title=title, xlabel=xlabel)
        ax.margins(0.15)
    legend_below(figure)
    return figure


@in_print
def roc_figure(rows: Sequence[Row]) -> Figure:
    """ROC, and precision over recall: a row of panels for each kind of label, a line for each gate.

    Args:
        rows: with ``labels``, ``gate``, ``false_positive_rate``, ``recall`` and ``precision``; of each kind of label
            and gate one for every limit, from rejecting nothing to rejecting everything (whose precision is the base
            rate).
    """
    kinds = list(dict.fromkeys(row["labels"] for row in rows))
    figure, axes = printed_figure(2 * max(1, len(kinds)), height=2.4, columns=2)
    for number, kind in enumerate(kinds):
        left, right = axes[2 * number : 2 * number + 2]
        own = [row for row in rows if row["labels"] == kind]
        for gate, (color, line) in zip(dict.fromkeys(row["gate"] for row in own), STYLES, strict=False):
            names = ("false_positive_rate", "recall", "precision")
            points = sorted(tuple(float(row[name]) for name in names) for row in own if row["gate"] == gate)
            fpr, recall, precision = zip(*points, strict=True)
            left.plot(fpr, recall, color=color, linestyle=line, label=gate)
            right.step(recall[1:], precision[1:], color=color, linestyle=line, where="pre")
        left.plot([0, 1], [0, 1], color=BLACK, linewidth=0.5)
        right.axhline(precision[-1], color=BLACK, linewidth=0.5)
        left.set(title=f"ROC, {kind}", xlabel="false positive rate", ylabel="true positive rate")
        right.set(title=f"precision and recall, {kind}", xlabel="recall", ylabel="precision")
        right.set(xlim=(-0.05, 1.05), ylim=(0, 1.03))
    legend_below(figure)
    return figure
