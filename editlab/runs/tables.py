"""Tables of a run, made once and written as plain text, Markdown or HTML; among them the table of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from editlab.metrics.names import METRICS, TABLE_GROUPS, full_name


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: the columns' names; in plain text a name with line breaks takes several lines.
        rows: cells, as many in each row as there are columns; an empty text is a missing value.
        numbers: indices of the columns that are aligned to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()

    def to_text(self, missing: str = "-") -> str:
        """Aligned columns for a terminal; missing numbers are shown as ``missing``."""
        names = [name.split("\n") for name in self.header]
        height = max(map(len, names))
        above = [[*[""] * (height - len(name)), *name] for name in names]
        lines = [list(line) for line in zip(*above, strict=True)]
        lines += [[cell or (missing if i in self.numbers else "") for i, cell in enumerate(row)] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = (
            "  ".join(
                cell.rjust(width) if i in self.numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        return "\n".join(line.rstrip() for line in aligned)

    def to_markdown(self) -> str:
        """A Markdown table; no text can break out of its cell."""
        rule = "".join(" ---: |" if i in self.numbers else " --- |" for i in range(len(self.header)))
        return "\n".join([_markdown_row(self.header), f"|{rule}", *map(_markdown_row, self.rows)])

    def to_html(self) -> str:
        """An HTML table in a box that scrolls sideways; texts are escaped."""

        def row(cells: Sequence[str], tag: str) -> str:
            opened = (f'<{tag} class="n">' if i in self.numbers else f"<{tag}>" for i in range(len(cells)))
            inner = "".join(f"{tags}{escape(cell)}</{tag}>" for tags, cell in zip(opened, cells, strict=True))
            return f"<tr>{inner}</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f'<div class="scroll"><table>\n<thead>{row(self.header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'
        )


def metric_table(metrics: Mapping[str, float | None]) -> Table:
    """The metrics of one run: a row for each metric that was measured, a column for each group.

    Args:
        metrics: ``group/metric`` -> value, as ``summary.json`` has it; None for a number that is not finite.

    >>> print(metric_table({"before/ES": 0.0, "retained/ES": 0.875}).to_markdown())
    |  | before | immediate | retained |
    | --- | ---: | ---: | ---: |
    | ES | 0.000 |  | 0.875 |
    """
    rows = []
    for metric in METRICS:
        values = [metrics.get(full_name(group, metric.name)) for group in TABLE_GROUPS]
        if any(value is not None for value in values):
            rows.append([metric.title, *("" if value is None else f"{value:.{metric.digits}f}" for value in values)])
    return Table(["", *TABLE_GROUPS], rows, numbers=range(1, 1 + len(TABLE_GROUPS)))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
