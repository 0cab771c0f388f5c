"""Figures in one style: colors that color-blind readers can distinguish, and line styles for black-and-white print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import StrMethodFormatter

from editlab.metrics.names import BEFORE, IMMEDIATE, PERPLEXITY, PERPLEXITY_START, RETAINED, full_name
from editlab.utils.files import atomic_file

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
"""The palette of Okabe and Ito."""

PRINT_WIDTH = 6.3
"""Inches between the margins of a printed page: figures of experiments are drawn at the size at which they are read."""

in_print = rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8, "lines.linewidth": 1.2})
"""Decorator of a function that draws a figure of that width, with text of 7 points or more."""

Series = Mapping[int, Mapping[str, float]]
"""Number of edits -> ``group/metric`` -> value, as in ``metrics.csv``."""

LINES = tuple(
    (color, line) for line in ("-", "--", ":") for color in (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
)
"""Color and line style of the first run in a figure, of the second, and so on."""

PANELS = (
    ("ES", "efficacy (ES)"),
    ("accuracy", "accuracy"),
    ("PS", "paraphrases (PS)"),
    ("NS", "neighbors (NS)"),
)
"""Metric and title of each panel of the forgetting curves."""

COMPARED = (
    ("retained/ES", "retained ES"),
    ("retained/accuracy", "retained accuracy"),
    ("retained/NS", "neighbors (NS)"),
    ("retained/perplexity", "held-out perplexity"),
)
"""Metric and title of each panel of a comparison of runs."""


def new_figure(rows: int, columns: int, width: float = 3.4, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row, with light grids and no upper or right frame; inches are of one panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, panels(figure, rows, columns)


def panels(figure: Figure | SubFigure, rows: int, columns: int) -> list[Axes]:
    """Adds the panels of :func:`new_figure` to an existing figure or a part of one."""
    axes = [figure.add_subplot(rows, columns, 1 + n) for n in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, linewidth=0.5)
    return axes


def printed_figure(count: int, height: float = 2.1, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of :data:`PRINT_WIDTH` with so many panels, row by row, at most ``columns`` in a row.

    Args:
        count: number of panels.
        height: of a row, in inches.
        columns: largest number of panels in a row.
    """
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure, axes = new_figure(rows, columns, PRINT_WIDTH / columns, height)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as ``.png`` and as ``.pdf`` of the same name; the PDF has TrueType fonts, as publishers ask."""
    for suffix in ("png", "pdf"):
        with atomic_file(path.with_suffix(f".{suffix}")) as temporary, rc_context({"pdf.fonttype": 42}):
            figure.savefig(temporary, format=suffix, dpi=150)


def legend_below(figure: Figure | SubFigure, columns: int = 4) -> None:
    """Draws one legend for all panels below them, if any line has a label."""
    labelled = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, frameon=False)


def draw_band(ax: Axes, curves: Sequence[Series], name: str, label: str, color: str, linestyle: str) -> None:
    """Draws the mean of one metric over several runs, with a band from the lowest to the highest value.

    Args:
        ax: panel to draw in.
        curves: the curve of each run; only numbers of edits at which all of them have the metric are drawn.
        name: name of the metric.
        label: text for the legend.
        color: color of line and band.
        linestyle: matplotlib's; ``none`` draws only points.
    """
    if not curves:
        return
    edits = sorted(set.intersection(*({n for n, row in curve.items() if name in row} for curve in curves)))
    if not edits:
        return
    values = [[curve[n][name] for curve in curves] for n in edits]
    mean = [sum(some) / len(some) for some in values]
    ax.plot(edits, mean, label=label, color=color, linestyle=linestyle, marker="o", markersize=3)
    low, high = [min(some) for some in values], [max(some) for some in values]
    if len(edits) > 1:
        ax.fill_between(edits, low, high, color=color, alpha=0.1, linewidth=0)
    elif len(curves) > 1:
        ax.vlines(edits, low, high, color=color, linewidth=1)


@in_print
def comparison_figure(*rows: Mapping[str, tuple[Sequence[Series], str, str]]) -> Figure:
    """Retained ES, accuracy, NS and held-out perplexity over the number of edits; bands are the range over runs.

    Args:
        *rows: blocks of two by two panels, each with its own legend: label -> (the runs' curves, color, line style).
    """
    figure = Figure(figsize=(PRINT_WIDTH, 4.6 * len(rows)), layout="constrained")
    for part, shown in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows, strict=True):
        axes = panels(part, 2, len(COMPARED) // 2)
        for ax, (name, title) in zip(axes, COMPARED, strict=True):
            for label, (curves, color, line) in shown.items():
                draw_band(ax, list(map(one_perplexity, curves)), name, label=label, color=color, linestyle=line)
            ax.set(ylabel=title, xlabel="edits")
        _wide_as_log(axes[-1])
        legend_below(part, columns=2)
    return figure


def _wide_as_log(ax: Axes, limit: float = 5.0) -> None:
    """Makes the y axis logarithmic if the values span more than a factor of ``limit``."""
    values = [float(y) for line in ax.get_lines() for y in np.asarray(line.get_ydata()) if np.isfinite(y)]
    if values and min(values) > 0 and max(values) > limit * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def forgetting_figure(curve: Series, perplexity_before: float | None, columns: int = 3) -> Figure:
    """Values before each edit, right after it, and retained, over the number of edits; and the held-out perplexity.

    A metric that the curve does not have gets no panel.

    Args:
        curve: ``before/<metric>``, ``immediate/<metric>`` and ``retained/<metric>`` over the number of edits; retained
            values at some of the edits only.
        perplexity_before: perplexity of the unedited model on the text of the curve (:func:`one_perplexity`); None if
            it was not measured.
        columns: number of panels in a row; 1 for a narrow screen.
    """
    curve = one_perplexity(curve)
    styles: dict[str, dict[str, Any]] = {
        BEFORE: {"color": BLACK, "linestyle": ":"},
        IMMEDIATE: {"color": ORANGE, "linestyle": "--"},
        RETAINED: {"color": BLUE, "marker": "o", "markersize": 3.5},
    }
    shown = [(name, title) for name, title in PANELS if any(_points(curve, full_name(group, name)) for group in styles)]
    perplexities = _points(curve, full_name(RETAINED, PERPLEXITY))
    count = len(shown) + bool(perplexities)
    columns = max(1, min(columns, count))
    figure, axes = new_figure(max(1, -(-count // columns)), columns)
    for ax, (name, title) in zip(axes, shown, strict=False):
        for group, style in styles.items():
            if points := _points(curve, full_name(group, name)):
                ax.plot(*zip(*points, strict=True), label=group, **style)
        ax.set(title=title, ylim=(-0.03, 1.03), xlabel="edits")
    legend_below(figure, 2 if columns == 1 else 4)  # before the last panel, which has a legend of its own
    if perplexities:
        ax = axes[len(shown)]
        if perplexity_before is not None:
            ax.axhline(perplexity_before, color=BLACK, linestyle=":", label="unedited")
        ax.plot(*zip(*perplexities, strict=True), color=VERMILION, marker="o", markersize=3.5, label="edited")
        ax.set(title="held-out perplexity", xlabel="edits")
        ax.legend(frameon=False, fontsize=8)
    for ax in axes[count:]:
        ax.remove()
    return figure


def one_perplexity(curve: Series) -> Series:
    """The same curve with the perplexity of the same tokens at every point.

    On the way the perplexity is measured on the beginning of a long text, and at the end on more of it too; the
    perplexity of the beginning then stands at every point.
    """
    start, whole = (full_name(RETAINED, name) for name in (PERPLEXITY_START, PERPLEXITY))
    return {edits: {**row, whole: row[start]} if start in row else row for edits, row in curve.items()}


def perplexity_of_curve(metrics: Mapping[str, Any], group: str) -> Any:
    """The perplexity in a group of a run's metrics on the tokens of its curve; None if it was not measured."""
    return metrics.get(full_name(group, PERPLEXITY_START), metrics.get(full_name(group, PERPLEXITY)))


def _points(curve: Series, name: str) -> list[tuple[int, float]]:
    return [(edits, row[name]) for edits, row in sorted(curve.items()) if name in row]
