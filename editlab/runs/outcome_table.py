"""The table of a run's edits: what each was to change, what became of it, and what the model says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from editlab.metrics.names import BEFORE, IMMEDIATE, RETAINED, TABLE_GROUPS, full_name
from editlab.runs.tables import Table

COLUMNS = (
    "edit", "prompt", "target", "status", "P before", "P after its step", "P now", "paraphrases", "neighbors",
    "generated before", "generated",
)  # fmt: skip
"""Columns of the table; those without any value are left out."""
_TEXTS = ("prompt", "target", "status", "generated before", "generated")
_AFTER, _NOW = COLUMNS.index("P after its step"), COLUMNS.index("P now")


def worst_first(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of a run's outcomes: edits that are not held, then those that are, each from the least likely target.

    Edits whose target was measured only right after their own step, as those that are not in the weights, come last.
    """
    return sorted(rows, key=_badness)


def _badness(row: Mapping[str, Any]) -> tuple[float, ...]:
    for group in (RETAINED, IMMEDIATE):
        if (hit := row.get(full_name(group, "hit"))) is not None:
            return float(group != RETAINED), hit, row[full_name(group, "logp_new")]
    return 2.0, 0.0, 0.0


def is_held(row: Mapping[str, Any]) -> bool | None:
    """Whether the argmax is right at every token of the target now; None if that was not measured."""
    hit = row.get(full_name(RETAINED, "hit"))
    return None if hit is None else bool(hit)


def prompt_of(row: Mapping[str, Any]) -> str:
    """The edit prompt with its subject."""
    return str(row["prompt"]).replace("{}", str(row.get("subject", "")))


def outcome_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of edits, in the order of the rows.

    The probability now has the class ``better`` where the edit is held and ``worse`` where it is not; in a run that has
    not measured its edits at the end, the probability right after the edit's own step has it.

    Args:
        rows: of :func:`editlab.runs.outcomes.outcome_rows` or :func:`editlab.runs.outcomes.read_outcomes`.
    """
    group = _judged(rows)
    marked = _NOW if group == RETAINED else _AFTER
    held = {
        (number, marked): "better" if row[full_name(group, "hit")] else "worse"
        for number, row in enumerate(rows)
        if full_name(group, "hit") in row
    }
    numbers = [i for i, name in enumerate(COLUMNS) if name not in _TEXTS]
    return Table(COLUMNS, [_cells(row) for row in rows], numbers, held).without_empty()


def _judged(rows: Iterable[Mapping[str, Any]]) -> str:
    """The group that says which edits are held: ``retained`` if any row has it."""
    return RETAINED if any(is_held(row) is not None for row in rows) else IMMEDIATE


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of an edit, for :data:`COLUMNS`."""

    def probability(group: str) -> str:
        logp = row.get(full_name(group, "logp_new"))
        return "" if logp is None else f"{math.exp(logp):.3f}"

    def of(hits: str, count: str) -> str:
        number = row.get(full_name(RETAINED, count))
        return "" if number is None else f"{row.get(full_name(RETAINED, hits), 0)} of {number}"

    texts = [str(row["edit"]), prompt_of(row), str(row["target_new"]), str(row["status"])]
    hits = [of("paraphrase_hits", "paraphrases"), of("neighbor_hits", "neighbors")]
    answers = [str(row.get(full_name(group, "generated"), "")) for group in (BEFORE, RETAINED)]
    return [*texts, *map(probability, TABLE_GROUPS), *hits, *answers]
