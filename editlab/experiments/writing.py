"""Writes the tables of an experiment from its finished runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from editlab.errors import UserError
from editlab.experiments.comparisons import with_comparison
from editlab.experiments.csv_files import Row, kept_rows, read_rows, update_rows, write_rows
from editlab.experiments.plan import Options, Run, all_cells, cases, load_function, planned
from editlab.experiments.spec import Experiment, TableSpec
from editlab.experiments.tables import (
    COLUMNS,
    provenance_of,
    provenance_of_all,
    rows_of_means,
    rows_of_runs,
    rows_of_snapshots,
)
from editlab.experiments.turning import turns
from editlab.utils.files import atomic_file


@dataclass
class Results:
    """What tables are made of, and those that are made already."""

    experiment: Experiment
    options: Options
    runs: Sequence[Run]
    """finished ones among those that were asked for"""
    all_runs: Sequence[Run]
    """all finished ones in the folder of the runs"""
    made: dict[str, list[Row]] = field(default_factory=dict)
    """kind of rows -> the first table of that kind, with rows of absent runs"""

    @cached_property
    def case_names(self) -> list[str]:
        """Names of all cases of the experiment, in their order."""
        return [case.name for case in cases(self.experiment, self.options, self.first_seed)]

    @property
    def first_seed(self) -> int:
        """The first one that was asked for."""
        return (self.options.seeds or self.experiment.seeds)[0]

    def path(self, file: str) -> Path:
        """Of a table."""
        return self.options.out / "results" / file

    def write(self) -> None:
        """Writes all tables, and the copied files; without any finished run only tables of cells are written."""
        for table in self.experiment.tables:
            for name in table.columns:
                if name not in COLUMNS:
                    raise UserError(
                        f"{self.experiment.path}: the table {table.file} has an unknown column {name!r}: "
                        f"there are {', '.join(COLUMNS)}."
                    )
            rows = ROWS[table.rows](self, table) if table.rows in ROWS else self._from_function(table)
            self.made.setdefault(table.rows, rows)
        for copy in self.experiment.copies:
            for run in self.all_runs:
                if (run.case.name, run.seed) == (copy.case, self.first_seed) and (run.folder / copy.file).exists():
                    self.path(copy.file).parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(self.path(copy.file)) as temporary:
                        shutil.copy(run.folder / copy.file, temporary)

    def _from_function(self, table: TableSpec) -> list[Row]:
        """Rows of a function by its import path; with a case and a seed they join those of absent runs."""
        if "." not in table.rows:
            raise UserError(
                f"{self.experiment.path}: the table {table.file} is of unknown rows {table.rows!r}: there are "
                f"{', '.join(ROWS)}, or give the import path of a function."
            )
        rows = [self._with_provenance(row) for row in load_function(table.rows)(self.all_runs)]
        if rows and all({"case", "seed"} <= row.keys() for row in rows):
            return update_rows(self.path(table.file), rows, self.case_names)
        return _written(rows, self.path(table.file))

    def _with_provenance(self, row: Row) -> Row:
        """A row of a function with what its run was made with, or all runs if it is of none; its own values stay."""
        key = (str(row.get("case")), str(row.get("seed")))
        own = [run for run in self.all_runs if (run.case.name, str(run.seed)) == key] or self.all_runs
        return {**provenance_of_all([provenance_of(run) for run in own]), **row}


def _written(rows: list[Row], path: Path) -> list[Row]:
    if rows:
        write_rows(rows, path)
    return rows


def _runs(results: Results, table: TableSpec) -> list[Row]:
    """The first such table takes up finished runs; further ones are parts of it."""
    path, first = results.path(table.file), "runs" not in results.made
    if first and not results.runs:
        return []
    if first:
        new = rows_of_runs(results.runs, table.columns)
        results.made["runs"] = new if table.where else update_rows(path, new, results.case_names)
    rows = results.made["runs"]
    if not table.where:
        return rows if first else _written(rows, path)
    chosen = [row for row in rows if all(str(row.get(k)) == str(v) for k, v in table.where.items())]
    return update_rows(path, chosen, results.case_names) if first else _written(chosen, path)


def _means(results: Results, table: TableSpec) -> list[Row]:
    rows = results.made["runs"]
    if not rows:
        return []
    assert table.against is not None  # `check_cases` holds
    found = rows_of_means(rows, table.baselines, table.against, results.case_names)
    if table.compare is not None:
        found = with_comparison(found, results.all_runs, table.compare)
    return _written(found, results.path(table.file))


def _snapshots(results: Results, table: TableSpec) -> list[Row]:
    if not results.runs:
        return []
    return update_rows(results.path(table.file), rows_of_snapshots(results.runs), results.case_names)


def _turns(results: Results, table: TableSpec) -> list[Row]:
    return _written(turns(results.made["snapshots"], results.made["runs"]), results.path(table.file))


def _cells(results: Results, table: TableSpec) -> list[Row]:
    """One row for each cell of the grids and each seed, finished or not; an earlier table's finished rows stay."""
    experiment, path = results.experiment, results.path(table.file)
    axes = [*dict.fromkeys(name for grid in experiment.grids for name in grid.axes), "seed"]
    table_rows = kept_rows(read_rows(path)) if path.exists() else []
    earlier = {tuple(row.get(name, "") for name in axes): row for row in table_rows if row["status"] == "done"}
    seeds = {*experiment.seeds, *(results.options.seeds or ()), *(int(row["seed"]) for row in earlier.values())}
    options = replace(results.options, only=None, where={}, seeds=sorted(seeds))
    runs = {(run.case.name, run.seed): run for run in planned(experiment, options)}
    found = []
    for _, cell, case in all_cells(experiment, options, results.first_seed):
        for seed in sorted(seeds):
            run = runs.get((case.name, seed))
            row: Row = {"case": case.name, **dict(reversed(list(cell.axes.items()))), **cell.labels, "seed": seed}
            row["status"] = "not run" if run is None or run.status == "to run" else run.status
            if run is not None and run.summary is not None:
                row |= rows_of_runs([run], table.columns)[0]
            else:
                row = earlier.get(tuple(str(row.get(name, "")) for name in axes), row)
            found.append(row)
    return _written(found, path)


ROWS: Mapping[str, Callable[[Results, TableSpec], list[Row]]] = {
    "runs": _runs, "means": _means, "snapshots": _snapshots, "turns": _turns, "cells": _cells,
}  # fmt: skip
"""kind of rows -> function that makes and writes a table of them, and returns all its rows"""
