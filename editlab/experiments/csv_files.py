"""Tables as CSV files that outlive their runs.

Rows of runs that are absent (made on another machine, or deleted since) stay until the same case and seed is run again.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from editlab.utils.csv_cells import defused, restored
from editlab.utils.files import atomic_file

Row: TypeAlias = dict[str, Any]

VERSIONS = ("editlab", "torch", "transformers", "peft")
"""Packages whose versions a table gives."""

MADE_WITH = ("recipe", "settings", "revision", "machine", *VERSIONS)
"""Last columns of every table of runs: what a row was made with."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, all values as text; a column that is empty in a row is absent from it."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: restored(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as a CSV file, :data:`MADE_WITH` last; a column that a row lacks is empty there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = dict.fromkeys(name for row in rows for name in row)
    columns = [*(n for n in named if n not in MADE_WITH), *(n for n in MADE_WITH if n in named)]
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: defused(value) for name, value in row.items()} for row in rows)


def update_rows(path: Path, rows: Sequence[Row], cases: Collection[str]) -> list[Row]:
    """Writes rows into a table in which those of other runs stay.

    Args:
        path: of the table, which need not exist.
        rows: new ones, each with its ``case`` and ``seed``; they replace all earlier ones of the same case and seed.
        cases: names of all cases of the experiment, in their order; earlier rows of other cases are dropped.

    Returns:
        All rows of the table, by case, seed and number of edits.
    """
    made = {(row["case"], int(row["seed"])) for row in rows}
    earlier = read_rows(path) if path.exists() else []
    kept = [row for row in earlier if row["case"] in cases and (row["case"], int(row["seed"])) not in made]
    order = {case: index for index, case in enumerate(cases)}
    found = sorted([*kept, *rows], key=lambda row: (order[row["case"]], int(row["seed"]), int(row.get("edits", 0))))
    write_rows(found, path)
    return found
