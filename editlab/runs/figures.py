"""Figures in one style: colors that a color-blind reader can tell apart, and line styles that print can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import StrMethodFormatter

from editlab.utils.files import atomic_file

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
"""Okabe and Ito's palette."""

Series = Mapping[int, Mapping[str, float]]
"""number of edits -> name -> value"""

LINES = tuple(
    (color, line) for line in ("-", "--", ":") for color in (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
)
"""Color and line of the first run in a figure, the second, ..."""

PANELS = (
    ("ES", "efficacy (ES)"),
    ("accuracy", "accuracy"),
    ("PS", "paraphrases (PS)"),
    ("NS", "neighbors (NS)"),
)

COMPARED = (
    ("retained/ES", "retained ES"),
    ("retained/accuracy", "retained accuracy"),
    ("retained/NS", "neighbors (NS)"),
    ("perplexity/heldout", "held-out perplexity"),
)


def new_figure(rows: int, columns: int, width: float = 3.4, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row, with light grids and no upper or right frame."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, panels(figure, rows, columns)


def panels(figure: Figure | SubFigure, rows: int, columns: int) -> list[Axes]:
    """The panels of :func:`new_figure` in a figure, or a part of one, that is there."""
    axes = [figure.add_subplot(rows, columns, 1 + n) for n in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, linewidth=0.5)
    return axes


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as ``.png`` and, beside it, as ``.pdf``."""
    for suffix in ("png", "pdf"):
        with atomic_file(path.with_suffix(f".{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150)


def legend_below(figure: Figure | SubFigure, columns: int = 4) -> None:
    """One legend for all panels, below them; none where nothing is labelled."""
    labelled = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, frameon=False)


def draw_band(ax: Axes, curves: Sequence[Series], name: str, label: str, color: str, linestyle: str) -> None:
    """The mean of one value over several runs, with the range between the lowest and the highest as a band.

    Args:
        ax: where.
        curves: one for each run; edits at which not all of them have the value are left out.
        name: of the value.
        label: for the legend.
        color: of line and band.
        linestyle: ``none`` draws points alone.
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


def comparison_figure(*rows: Mapping[str, tuple[Sequence[Series], str, str]]) -> Figure:
    """Retained ES, accuracy, NS and held-out perplexity over edits, a line each; bands are the range over several runs.

    Args:
        *rows: of panels: label -> the runs' curves, color, line. Each row has a legend of its own.
    """
    figure = Figure(figsize=(3.2 * len(COMPARED), 2.9 * len(rows)), layout="constrained")
    for part, shown in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows, strict=True):
        axes = panels(part, 1, len(COMPARED))
        for ax, (name, title) in zip(axes, COMPARED, strict=True):
            for label, (curves, color, line) in shown.items():
                draw_band(ax, curves, name, label=label, color=color, linestyle=line)
            ax.set(title=title, xlabel="edits")
        _wide_as_log(axes[-1])
        legend_below(part)
    return figure


def _wide_as_log(ax: Axes, limit: float = 5.0) -> None:
    """A logarithmic axis with plain numbers where lines span a factor above ``limit``: one would flatten the others."""
    values = [float(y) for line in ax.get_lines() for y in np.asarray(line.get_ydata()) if np.isfinite(y)]
    if values and min(values) > 0 and max(values) > limit * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def forgetting_figure(curve: Series, before: Series, immediate: Series, perplexity_before: float | None) -> Figure:
    """Retained, immediate and before-edit values over the number of edits, and the held-out perplexity.

    Args:
        curve: points with ``retained/<name>`` and ``perplexity/heldout``.
        before: each batch's values before any edit.
        immediate: each batch's values right after its edit.
        perplexity_before: the unedited model's.
    """
    figure, axes = new_figure(2, 3)
    for ax, (name, title) in zip(axes, PANELS, strict=False):
        for series, key, label, style in (
            (before, name, "before", {"color": BLACK, "linestyle": ":"}),
            (immediate, name, "immediate", {"color": ORANGE, "linestyle": "--"}),
            (curve, f"retained/{name}", "retained", {"color": BLUE, "marker": "o", "markersize": 3.5}),
        ):
            points = [(edits, row[key]) for edits, row in sorted(series.items()) if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), label=label, **style)
        ax.set(title=title, ylim=(-0.03, 1.03), xlabel="edits")
    points = [(n, row["perplexity/heldout"]) for n, row in sorted(curve.items()) if "perplexity/heldout" in row]
    ax = axes[4]
    if perplexity_before is not None:
        ax.axhline(perplexity_before, color=BLACK, linestyle=":", label="unedited")
    if points:
        ax.plot(*zip(*points, strict=True), color=VERMILION, marker="o", markersize=3.5, label="edited")
    ax.set(title="held-out perplexity", xlabel="edits")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)
    axes[5].axis("off")
    named = {label: handle for ax in axes[:4] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[5].legend(named.values(), named.keys(), loc="center left", frameon=False)
    return figure
