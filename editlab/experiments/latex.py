r"""Numbers and tables of the report as LaTeX, read from ``results/``, so that its text cannot drift from the data.

In the report's sources a number is written as the cell that it stands in, ``\val{TABLE}{ROW}{COLUMN}{FORMAT}``:

.. code-block:: latex

    Consolidated memory gains \val{replay_ablation_means}{both|none}{retained/accuracy}{points} points.

``TABLE`` is a file of ``results/`` without its suffix. ``ROW`` is a case, ``CASE@SEED``, ``CASE@mean`` for the mean
over its rows, or ``COLUMN=VALUE`` several times with commas between; ``A|B`` is the difference of two rows. ``FORMAT``
is a number of digits or one of :data:`FORMATS`. ``\ci`` in place of ``\val`` gives the interval, from the columns
``COLUMN_low`` and ``COLUMN_high``, or for ``A|B`` from their runs, paired by seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import fmean

from editlab.errors import UserError
from editlab.experiments.csv_files import Row, read_rows
from editlab.experiments.schema import build
from editlab.experiments.statistics import t_interval

FORMATS: Mapping[str, Callable[[float], str]] = {
    "points": lambda x: _signed(_rounded(x, 1, 100), plus=True),
    "gain": lambda x: _signed(_rounded(x, 1, 100)),
    "percent": lambda x: _signed(_rounded(x, 1, 100)) + r"\%",
    "times": lambda x: _rounded(x, 2) + r"$\times$",
    "count": lambda x: f"{x:,.0f}",
}
"""Formats of a number: a fraction in points, with its sign or (``gain``) without; in percent; a factor; a whole number
with commas. A digit is a format, too: so many digits after the point."""

QUANTITY = re.compile(
    r"\\(?P<kind>val|ci)\{(?P<table>[^{}]*)\}\{(?P<row>[^{}]*)\}\{(?P<column>[^{}]*)\}\{(?P<form>[^{}]*)\}"
)
"""A number or an interval in the report's sources."""

NOT_RUN = "not run"
MEAN = "@mean"
"""Ends the name of a row that stands for the mean over several."""


@dataclass(frozen=True)
class ColumnSpec:
    """A column of a table of the report."""

    column: str
    """its name in the CSV file"""
    head: str
    """its title, in LaTeX"""
    form: str = "3"
    """a number of digits, or a name in :data:`FORMATS`"""
    interval: bool = False
    """whether the cell also gives the interval"""
    mean_of: str = ""
    """another file, with a row for each run, of whose rows of the case the mean is given"""


@dataclass(frozen=True)
class GroupSpec:
    """Rows of a table that stand together, between rules."""

    rows: Mapping[str, str]
    """row of the CSV file, as in ``\\val`` -> label, in LaTeX"""
    title: str = ""


@dataclass(frozen=True)
class ReportTableSpec:
    """A table of the report, from one CSV file."""

    file: str
    """name of the CSV file without its suffix"""
    columns: tuple[ColumnSpec, ...]
    groups: tuple[GroupSpec, ...]
    head: str = ""
    """title of the column of labels, in LaTeX"""


@dataclass
class Results:
    """The tables of a folder, read as they are asked for."""

    folder: Path
    _tables: dict[str, list[Row]] = field(default_factory=dict)

    def number(self, table: str, row: str, column: str) -> float:
        """The number in a cell; of two rows ``A|B`` the difference A - B.

        Raises:
            UserError: if there is no such table, row or number, or the row is not the only one.
        """
        if "|" in row:
            first, _, second = row.partition("|")
            return self.number(table, first, column) - self.number(table, second, column)
        found = self.rows(table, row)
        if not found or (len(found) > 1 and not row.endswith(MEAN)):
            raise UserError(f"results/{table}.csv has {len(found)} rows {row!r}, and the report needs one: name it.")
        try:
            return fmean(float(one[column]) for one in found)
        except (KeyError, ValueError):
            raise UserError(f"results/{table}.csv has no number {column!r} in the row {row!r}.") from None

    def rows(self, table: str, row: str) -> list[Row]:
        """The rows of a table that a name stands for; ``CASE@mean`` stands for all of the case.

        Raises:
            UserError: if there is no such table.
        """
        if table not in self._tables:
            path = self.folder / f"{table}.csv"
            if not path.exists():
                raise UserError(f"{path} does not exist, and the report takes numbers from it.")
            self._tables[table] = read_rows(path)
        case, _, seed = row.removesuffix(MEAN).partition("@")
        wanted = dict(pair.split("=", 1) for pair in row.split(",")) if "=" in row else {"case": case}
        wanted |= {"seed": seed} if seed else {}
        return [one for one in self._tables[table] if all(one.get(name) == value for name, value in wanted.items())]

    def interval(self, table: str, row: str, column: str) -> tuple[float, float]:
        """The interval of a number; of two cases ``A|B`` the 95% t-interval of their difference, paired by seed.

        Raises:
            UserError: as for :meth:`number`.
        """
        if "|" in row:
            first, second = (
                {one.get("seed"): float(one[column]) for one in self.rows(table, r)} for r in row.split("|", 1)
            )
            _, low, high = t_interval([value - second[seed] for seed, value in first.items() if seed in second])
            return low, high
        return self.number(table, row, f"{column}_low"), self.number(table, row, f"{column}_high")


def numbers(sources: Sequence[str], results: Results) -> str:
    """LaTeX definitions of all numbers that sources name.

    Args:
        sources: texts of the report's LaTeX files.
        results: where the numbers are.

    Raises:
        UserError: if a number does not exist or its format is unknown.
    """
    named = dict.fromkeys(match for source in sources for match in QUANTITY.findall(source))
    lines = ["% Written by scripts/make_report_tables.py from results/."]
    for kind, table, row, column, form in named:
        text = (
            _interval(results.interval(table, row, column), form)
            if kind == "ci"
            else _formatted(results.number(table, row, column), form)
        )
        name = ":".join(("editlab", kind, table, row, column, form))
        lines.append(rf"\expandafter\def\csname {name}\endcsname{{{text}}}")
    return "\n".join(lines) + "\n"


def tabular(spec: ReportTableSpec, results: Results) -> str:
    """A table of the report in LaTeX (booktabs); a row that the file lacks says that it was not run.

    Raises:
        UserError: if the file or a number does not exist, or a format is unknown.
    """
    columns = len(spec.columns)
    lines = [rf"\begin{{tabular}}{{l{'r' * columns}}}", r"\toprule"]
    lines.append(" & ".join([spec.head, *(column.head for column in spec.columns)]) + r" \\")
    for group in spec.groups:
        lines.append(r"\midrule")
        if group.title:
            lines.append(rf"\multicolumn{{{columns + 1}}}{{l}}{{\textit{{{group.title}}}}} \\")
        for row, label in group.rows.items():
            found = results.rows(spec.file, row)
            if found and found[0].get("seeds") != "0":
                cells = [_cell(results, spec.file, row, column) for column in spec.columns]
            else:
                cells = [rf"\multicolumn{{{columns}}}{{c}}{{{NOT_RUN}}}"]
            lines.append(" & ".join([label, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def table_specs(content: object) -> dict[str, ReportTableSpec]:
    """The tables of the report, by name, from the content of its YAML file.

    Raises:
        UserError: as for :func:`editlab.experiments.schema.build`.
    """
    if not isinstance(content, Mapping):
        raise UserError("The tables of the report must be a mapping of names to tables.")
    return {str(name): build(ReportTableSpec, one, f"table {name}") for name, one in content.items()}


def _cell(results: Results, table: str, row: str, column: ColumnSpec) -> str:
    if column.mean_of:
        return _formatted(results.number(column.mean_of, f"{row}{MEAN}", column.column), column.form)
    cells = results.rows(table, row)[0]
    own_baseline = column.column.endswith("_gain") and cells.get("against") == cells.get("case")
    if not cells.get(column.column) or own_baseline:
        return "--"
    text = _formatted(results.number(table, row, column.column), column.form)
    if not column.interval or cells.get(f"{column.column}_low", "nan") == "nan":  # nan: of one seed
        return text
    return rf"{text}~\interval{{{_interval(results.interval(table, row, column.column), column.form)}}}"


def _interval(bounds: tuple[float, float], form: str) -> str:
    low, high = (_formatted(bound, form) for bound in bounds)
    return f"[{low}, {high}]"


def _formatted(value: float, form: str) -> str:
    if form.isdigit():
        return _signed(_rounded(value, int(form)))
    if form not in FORMATS:
        raise UserError(f"The report has an unknown format {form!r}: give a number of digits, or {', '.join(FORMATS)}.")
    return FORMATS[form](value)


def _rounded(value: float, digits: int, times: int = 1) -> str:
    """A number with some digits after the point; halves are rounded up, as by hand: 0.9275 is 0.928."""
    exact = Decimal(repr(round(value, 10))) * times
    return str(exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _signed(text: str, plus: bool = False) -> str:
    """A number with LaTeX's own minus and, if asked for, a plus; a zero has none."""
    if not text.strip("-0."):
        return text.strip("-")
    if text.startswith("-"):
        return f"$-${text[1:]}"
    return f"$+${text}" if plus else text
