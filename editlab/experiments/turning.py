"""Gradual or catastrophic: where a run's curve gets steep, from the tables of ``run_forgetting.py``.

Forgetting is gradual where each stretch of edits takes about as much as the one before, and catastrophic where a single
stretch takes most of what was there, of the edits (accuracy) or of the language (perplexity). Points are snapshots, so
where something happened is known up to the distance between two of them; the table names the later one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from tables import MADE_WITH, Row

D_K = 1536
"""Key dimension of SmolLM2-135M's MLP projections: so many keys are linearly independent at most."""

MARKS: dict[str, Callable[[Row, float], bool]] = {
    "accuracy_under_80": lambda row, before: _number(row, "retained_accuracy") < 0.8,
    "accuracy_under_50": lambda row, before: _number(row, "retained_accuracy") < 0.5,
    "ES_under_50": lambda row, before: _number(row, "retained_ES") < 0.5,
    "perplexity_over_1.4": lambda row, before: _ratio(row, before) > 1.4,
    "perplexity_over_2": lambda row, before: _ratio(row, before) > 2.0,
    "perplexity_over_10": lambda row, before: _ratio(row, before) > 10.0,
}
"""column -> whether a snapshot is past that mark, given the unedited model's perplexity"""


def _ratio(row: Row, before: float) -> float:
    return _number(row, "perplexity_heldout") / before


def _number(row: Row, name: str) -> float:
    """What a row has in a column; NaN, which is past no mark, where it was not measured."""
    return float(row.get(name, math.nan))


def turns(snapshots: Sequence[Row], runs: Sequence[Row]) -> list[Row]:
    """One row for each run that has snapshots on the way.

    Args:
        snapshots: of :func:`tables.snapshots`, in the order of edits.
        runs: of :func:`tables.table_rows`; they know the unedited model's perplexity, where it was measured.
    """
    before = {(run["case"], int(run["seed"])): _number(run, "perplexity_before") for run in runs}
    found = []
    for case, seed in dict.fromkeys((row["case"], int(row["seed"])) for row in snapshots):
        own = [row for row in snapshots if (row["case"], int(row["seed"])) == (case, seed)]
        if len(own) > 1:
            found.append({"case": case, "seed": seed, **turn(own, before.get((case, seed), math.nan))})
    return found


def turn(curve: Sequence[Row], before: float) -> Row:
    """Where one run passes each mark (empty where it never does), and its steepest stretches.

    Args:
        curve: its snapshots; at least two.
        before: perplexity of the unedited model; NaN where it was not measured.

    Returns:
        Numbers of edits for the marks. ``fall``s are what a stretch takes of accuracy, in points: from one snapshot to
        the next, so that edits that never took are no loss, and only where both asked for as many, so that a sample is
        not held against all. ``rise``s are what a stretch multiplies perplexity by. Where the steepest of each ends are
        also its place in edits per key dimension, the norm and the Gram matrix' condition there, and the largest single
        update in it, over the median of those.
    """
    row: Row = {name: next((int(p["edits"]) for p in curve if past(p, before)), "") for name, past in MARKS.items()}
    alike = [(earlier, later) for earlier, later in pairwise(curve) if earlier["measured"] == later["measured"]]
    falls = [100 * (float(a["retained_accuracy"]) - float(b["retained_accuracy"])) for a, b in alike]
    perplexity = [before, *(_number(point, "perplexity_heldout") for point in curve)]
    rises = [later / earlier for earlier, later in pairwise(perplexity)]
    row |= _steepest("fall", falls, [later for _, later in alike], curve, 1)
    row |= _steepest("rise", rises if all(map(math.isfinite, rises)) else [], curve, curve, 3)
    return row | {name: curve[-1][name] for name in MADE_WITH if name in curve[-1]}


def _steepest(what: str, steps: Sequence[float], ends: Sequence[Row], curve: Sequence[Row], digits: int) -> Row:
    """The largest of some steps beside the median one, and what the snapshot at its end knows; {} without steps."""
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
