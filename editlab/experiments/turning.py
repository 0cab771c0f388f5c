"""Gradual or catastrophic forgetting: where a run's curve is steepest, from its snapshots.

Forgetting is gradual if each stretch of edits costs about as much as the one before, and catastrophic if a single
stretch costs most of it, in accuracy or in perplexity. A stretch lies between two snapshots; the table names the later
one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from editlab.experiments.csv_files import MADE_WITH, Row

D_K = 1536
"""Key dimension of SmolLM2-135M's MLP projections, the largest number of linearly independent keys."""

MARKS: dict[str, Callable[[Row, float], bool]] = {
    "accuracy_under_80": lambda row, before: _number(row, "retained/accuracy") < 0.8,
    "accuracy_under_50": lambda row, before: _number(row, "retained/accuracy") < 0.5,
    "ES_under_50": lambda row, before: _number(row, "retained/ES") < 0.5,
    "perplexity_over_1.4": lambda row, before: _ratio(row, before) > 1.4,
    "perplexity_over_2": lambda row, before: _ratio(row, before) > 2.0,
    "perplexity_over_10": lambda row, before: _ratio(row, before) > 10.0,
}
"""column -> whether a snapshot is past that mark, given the unedited model's perplexity"""


def _ratio(row: Row, before: float) -> float:
    return _number(row, "retained/perplexity") / before


def _number(row: Row, *names: str) -> float:
    """The first of several columns that a row has; NaN, which is past no mark, if none of them was measured."""
    return float(next((row[name] for name in names if name in row), math.nan))


def turns(snapshots: Sequence[Row], runs: Sequence[Row]) -> list[Row]:
    """One row for each run that has at least two snapshots.

    Args:
        snapshots: of :func:`editlab.experiments.tables.rows_of_snapshots`, in the order of edits.
        runs: of :func:`editlab.experiments.tables.rows_of_runs`, with the unedited model's perplexity if measured.
    """
    # Snapshots are measured on the beginning of the text, which is all of it if that has no column of its own.
    before = {
        (run["case"], int(run["seed"])): _number(run, "before/perplexity_start", "before/perplexity") for run in runs
    }
    found = []
    for case, seed in dict.fromkeys((row["case"], int(row["seed"])) for row in snapshots):
        own = [row for row in snapshots if (row["case"], int(row["seed"])) == (case, seed)]
        if len(own) > 1:
            found.append({"case": case, "seed": seed, **turn(own, before.get((case, seed), math.nan))})
    return found


def turn(curve: Sequence[Row], before: float) -> Row:
    """Number of edits at which one run passes each mark (empty if it never does), and its steepest stretches.

    Args:
        curve: its snapshots; at least two.
        before: perplexity of the unedited model; NaN if it was not measured.

    Returns:
        The numbers of edits of :data:`MARKS`; the steepest and the median ``fall`` (points of accuracy lost between two
        snapshots that were measured on equally many edits) and ``rise`` (factor of the perplexity); and at the end of
        the steepest ones: edits, edits per key dimension, norm of the update, condition of the Gram matrix, and the
        largest single update over the median one.
    """
    row: Row = {name: next((int(p["edits"]) for p in curve if past(p, before)), "") for name, past in MARKS.items()}
    alike = [(a, b) for a, b in pairwise(curve) if a.get("measured") == b.get("measured")]
    falls = [100 * (float(a["retained/accuracy"]) - float(b["retained/accuracy"])) for a, b in alike]
    perplexity = [before, *(_number(point, "retained/perplexity") for point in curve)]
    rises = [later / earlier for earlier, later in pairwise(perplexity)]
    row |= _steepest("fall", falls, [later for _, later in alike], curve, 1)
    row |= _steepest("rise", rises if all(map(math.isfinite, rises)) else [], curve, curve, 3)
    return row | {name: curve[-1][name] for name in MADE_WITH if name in curve[-1]}


def _steepest(what: str, steps: Sequence[float], ends: Sequence[Row], curve: Sequence[Row], digits: int) -> Row:
    """The largest and the median of some steps, and the snapshot at the end of the largest; empty without steps."""
    if not steps:
        return {}
    there = ends[max(range(len(steps)), key=steps.__getitem__)]
    updates = [float(point["largest_update"]) for point in curve if point.get("largest_update")]
    known = updates and there.get("largest_update")
    return {
        f"steepest_{what}": round(max(steps), digits),
        f"median_{what}": round(statistics.median(steps), digits),
        f"{what}_at": int(there["edits"]),
        f"{what}_edits_a_key_dimension": round(int(there["edits"]) / D_K, 2),
        f"{what}_delta_norm": there.get("delta_norm", ""),
        f"{what}_gram_condition": there.get("gram_condition", ""),
        f"{what}_update_over_median": round(float(there["largest_update"]) / statistics.median(updates), 2)
        if known
        else "",
    }
