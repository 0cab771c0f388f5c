"""The numbers that a training step logs, next to the scores of its facts."""

from __future__ import annotations

from collections.abc import Mapping

from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome


def step_metrics(outcome: EditOutcome, layers: Mapping[int, EditedLayer], superseded: int) -> dict[str, float]:
    """The numbers of a solve, its verdict and its callbacks, by full name.

    Args:
        outcome: the batch, after its last event.
        layers: layer number -> the edited layer.
        superseded: number of kept edits that a later one has superseded so far.
    """
    rows = {f"solve/{name}": value for name, value in outcome.diagnostics.items()}
    rows |= {f"weights/layer_{number}/delta_norm": layer.relative_norm() for number, layer in layers.items()}
    rows |= {"edit/factor": outcome.factor, "edit/dropped": float(len(outcome.dropped))}
    rows |= {"edit/additions": float(len(outcome.plan.additions)), "edit/superseded": float(superseded)}
    return rows | outcome.measured
