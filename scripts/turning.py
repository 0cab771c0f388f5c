"""Gradual or catastrophic: where a run's curve gets steep, from the tables of ``run_forgetting.py``.

Forgetting is gradual where each stretch of edits takes about as much as the one before, and catastrophic where a single
stretch takes most of what was there. Points are snapshots, so where something happened is known up to the distance
between two of them; the table names the later one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from tables import MADE_WITH, Row

D_K = 1536
"""Key dimension of SmolLM2-135M's MLP projections: so many keys are linearly independent at most."""

MARKS: dict[str, Callable[[Row, float], bool]] = {
    "accuracy_under_80": lambda row, before: float(row["retained_accuracy"]) < 0.8,
    "accuracy_under_50": lambda row, before: float(row["retained_accuracy"]) < 0.5,
    "ES_under_50": lambda row, before: float(row["retained_ES"]) < 0.5,
    "perplexity_over_1.4": lambda row, before: _ratio(row, before) > 1.4,
    "perplexity_over_2": lambda row, before: _ratio(row, before) > 2.0,
}
"""column -> whether a snapshot is past that mark, given the unedited model's perplexity"""


def _ratio(row: Row, before: float) -> float:
    return float(row["perplexity_heldout"]) / before


def turns(snapshots: Sequence[Row], runs: Sequence[Row]) -> list[Row]:
    """One row for each run that has snapshots on the way.

    Args:
        snapshots: of :func:`tables.snapshots`, in the order of edits.
        runs: of :func:`tables.table_rows`; they know the unedited model's perplexity.
    """
    before = {(run["case"], int(run["seed"])): float(run["perplexity_before"]) for run in runs}
    found = []
    for case, seed in dict.fromkeys((row["case"], int(row["seed"])) for row in snapshots):
        own = [row for row in snapshots if (row["case"], int(row["seed"])) == (case, seed)]
        if len(own) > 1:
            found.append({"case": case, "seed": seed, **turn(own, before[case, seed])})
    return found


def turn(curve: Sequence[Row], before: float) -> Row:
    """Where one run passes each mark (empty where it never does), and its steepest stretch.

    Args:
        curve: its snapshots; at least two.
        before: perplexity of the unedited model.

    Returns:
        Numbers of edits; ``steepest_fall`` and ``median_fall`` are of accuracy over one stretch, in points. Where the
        steepest ends are also its place in edits per key dimension, the norm and the Gram matrix' condition there, the
        rise of perplexity over the stretch (a ratio), and the largest single update in it, over the median of those.
    """
    row: Row = {name: next((int(p["edits"]) for p in curve if past(p, before)), "") for name, past in MARKS.items()}
    accuracy = [1.0, *(float(point["retained_accuracy"]) for point in curve)]
    falls = [100 * (earlier - later) for earlier, later in pairwise(accuracy)]
    place = max(range(len(falls)), key=falls.__getitem__)
    there = curve[place]
    perplexity = _ratio(there, float(curve[place - 1]["perplexity_heldout"]) if place else before)
    updates = [float(point["largest_update"]) for point in curve if point.get("largest_update")]
    row |= {
        "steepest_fall": round(falls[place], 1),
        "median_fall": round(statistics.median(falls), 1),
        "steepest_at": int(there["edits"]),
        "edits_a_key_dimension": round(int(there["edits"]) / D_K, 2),
        "delta_norm": there.get("delta_norm", ""),
        "gram_condition": there.get("gram_condition", ""),
        "perplexity_over_stretch": round(perplexity, 3),
        "largest_update_over_median": round(float(there["largest_update"]) / statistics.median(updates), 2)
        if updates and there.get("largest_update")
        else "",
    }
    return row | {name: there[name] for name in MADE_WITH if name in there}
