"""Tables as CSV files that outlive their runs.

Rows of runs that are absent (made on another machine, or deleted since) stay until the same case and seed is run again.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from editlab.errors import UserError
from editlab.utils.csv_cells import defused, restored
from editlab.utils.files import atomic_file

Row: TypeAlias = dict[str, Any]

VERSIONS = ("editlab", "torch", "transformers", "peft")
"""Packages whose versions a table gives."""

MADE_WITH = ("recipe", "settings", "revision", "machine", *VERSIONS)
"""Last columns of every table of runs: what a row was made with."""

REQUIRED = ("settings", "revision", "machine", *VERSIONS)
"""Columns that no row may lack: without them nobody can tell what made a number."""

UNKNOWN = "unknown"
"""Stands for a value that was not recorded when the row was made."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, all values as text; a column that is empty in a row is absent from it."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: restored(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as a CSV file, :data:`MADE_WITH` last; a column that a row lacks is empty there.

    Raises:
        UserError: if a row lacks its provenance, :data:`REQUIRED`; the file is then not written. Rows of runs that do
            not exist yet need none.
    """
    _require_provenance(rows, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = dict.fromkeys(name for row in rows for name in row)
    columns = [*(n for n in named if n not in MADE_WITH), *(n for n in MADE_WITH if n in named)]
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: defused(value) for name, value in row.items()} for row in rows)


def _require_provenance(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    for row in rows:
        lacking = [name for name in REQUIRED if not row.get(name)]
        if lacking and not _is_absent(row):
            shown = ", ".join(f"{name} {row[name]}" for name in ("case", "seed") if name in row) or "a row"
            raise UserError(
                f"{path} is not written, because {shown} does not say with which {', '.join(lacking)} it was made: run "
                "it by editlab sweep, which records them."
            )


def _is_absent(row: Mapping[str, Any]) -> bool:
    """Whether a row stands for runs that have not been made or have failed, and so has no numbers."""
    return str(row.get("seeds")) == "0" or row.get("status") in ("not run", "failed")


def kept_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of an earlier table, which may be older than a column of :data:`REQUIRED`: its value is then unknown."""
    return [row if _is_absent(row) else {**row, **{n: row.get(n) or UNKNOWN for n in REQUIRED}} for row in rows]


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
    earlier = kept_rows(read_rows(path)) if path.exists() else []
    kept = [row for row in earlier if row["case"] in cases and (row["case"], int(row["seed"])) not in made]
    order = {case: index for index, case in enumerate(cases)}
    found = sorted([*kept, *rows], key=lambda row: (order[row["case"]], int(row["seed"]), int(row.get("edits", 0))))
    write_rows(found, path)
    return found
