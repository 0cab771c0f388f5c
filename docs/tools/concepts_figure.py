"""Draws docs/images/one_batch.svg: how one batch of facts becomes an update, and what is measured of it.

Run it by ``python docs/tools/concepts_figure.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parents[1] / "images" / "one_batch.svg"
STEP, MEMORY, CALLBACK = "#dbe4ff", "#e6f4e6", "#fff0d6"


def box(ax: Axes, x: float, y: float, width: float, title: str, text: str, color: str = STEP) -> None:
    """A rounded box with a bold title and a line of explanation, its lower left corner at (x, y)."""
    ax.add_patch(FancyBboxPatch((x, y), width, 1.0, boxstyle="round,pad=0.04,rounding_size=0.12", fc=color, ec="#444"))
    ax.text(x + width / 2, y + 0.68, title, ha="center", va="center", weight="bold", size=10.5)
    ax.text(x + width / 2, y + 0.3, text, ha="center", va="center", size=8.4)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    """An arrow between two points; dashed for what callbacks do."""
    style = {"arrowstyle": "-|>", "color": "#333", "lw": 1.2, "linestyle": "--" if dashed else "-"}
    ax.annotate("", end, start, arrowprops=style)


def main() -> None:
    """Writes the figure."""
    plt.rcParams["svg.hashsalt"] = "editlab"  # the same bytes each time
    figure, ax = plt.subplots(figsize=(9.2, 5.0))
    ax.set(xlim=(-0.1, 11.9), ylim=(-0.2, 6.2))
    ax.axis("off")
    box(ax, 0.0, 3.3, 2.2, "Facts", "one batch, e.g. 16")
    box(ax, 3.0, 4.2, 2.6, "Values v*", "what the layer\nshould output")
    box(ax, 3.0, 2.6, 2.6, "Keys k", "the layer's input at the\nsubject's last token")
    box(ax, 6.3, 3.3, 2.4, "Closed form", "residual V − W K, slack\n→ update of W")
    box(ax, 9.4, 3.3, 2.3, "Weights", "MLP output projection\nof a few layers")
    box(ax, 6.3, 1.5, 2.4, "Metric C", "λ·C0 + context keys\n+ past keys", MEMORY)
    box(ax, 3.0, 1.0, 2.6, "Ordinary text", "second moments C0", MEMORY)
    box(ax, 9.4, 1.2, 2.3, "Metrics", "before, immediate,\nretained")
    box(ax, 6.3, 5.1, 2.4, "Replay", "adds earlier edits", CALLBACK)
    box(ax, 9.4, 5.1, 2.3, "Trust, LoRA", "veto or adjust", CALLBACK)
    for start, end in (
        ((2.25, 3.95), (2.95, 4.6)), ((2.25, 3.65), (2.95, 3.1)), ((5.65, 4.6), (6.25, 3.95)),
        ((5.65, 3.1), (6.25, 3.65)), ((8.75, 3.8), (9.35, 3.8)), ((7.5, 2.55), (7.5, 3.25)),
        ((5.65, 1.5), (6.25, 1.9)), ((10.55, 3.25), (10.55, 2.25)),
    ):  # fmt: skip
        arrow(ax, start, end)
    for start, end in (((7.5, 5.05), (7.5, 4.38)), ((10.55, 5.05), (10.55, 4.38))):
        arrow(ax, start, end, dashed=True)
    ax.text(0.0, 0.35, "dashed: callbacks, each of which can be left out of a recipe", size=9, color="#555")
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
