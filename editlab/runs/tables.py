"""Tables of a run, made once and written as plain text, Markdown or HTML; among them the table of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from editlab.metrics.names import METRICS, TABLE_GROUPS, full_name

WIDEST = 4
"""Number of columns that fit on the screen of a phone."""


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: the columns' names; in plain text a name with line breaks takes several lines.
        rows: cells, as many in each row as there are columns; an empty text is a missing value.
        numbers: indices of the columns that are aligned to the right.
        classes: (row, column) -> CSS class of the cell in HTML, such as ``better``.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    classes: Mapping[tuple[int, int], str] = field(default_factory=dict)

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
        """An HTML table in a box that scrolls sideways; texts are escaped, and isolated in their direction of writing.

        A table of more than :data:`WIDEST` columns has the class ``cards``, and each cell its column's name, so that a
        style sheet can show the rows one below the other on a narrow screen.
        """
        cards = len(self.header) > WIDEST

        def cell(text: str, column: int, row: int | None) -> str:
            tag = "th" if row is None else "td"
            given = "" if row is None else self.classes.get((row, column), "")
            kinds = " ".join(filter(None, ("n" if column in self.numbers else "", given)))
            opened = tag + (f' class="{kinds}"' if kinds else "")
            opened += f' data-label="{escape(self.header[column])}"' if cards and row is not None else ""
            return f"<{opened}><bdi>{escape(text)}</bdi></{tag}>" if text else f"<{opened}></{tag}>"

        def line(cells: Sequence[str], row: int | None = None) -> str:
            return f"<tr>{''.join(cell(text, column, row) for column, text in enumerate(cells))}</tr>"

        cards_class = ' class="cards"' if cards else ""
        body = "\n".join(line(cells, row) for row, cells in enumerate(self.rows))
        return (
            f'<div class="scroll"><table{cards_class}>\n'
            f"<thead>{line(self.header)}</thead>\n<tbody>{body}</tbody></table></div>"
        )


def metric_table(metrics: Mapping[str, float | None]) -> Table:
    """The metrics of one run: a row for each metric that was measured, a column for each group.

    In HTML, values after an edit have the class ``better`` or ``worse`` where they differ from those before it.

    Args:
        metrics: ``group/metric`` -> value, as ``summary.json`` has it; None for a number that is not finite.

    >>> print(metric_table({"before/ES": 0.0, "retained/ES": 0.875}).to_markdown())
    |  | before | immediate | retained |
    | --- | ---: | ---: | ---: |
    | ES | 0.000 |  | 0.875 |
    """
    rows: list[list[str]] = []
    classes: dict[tuple[int, int], str] = {}
    for metric in METRICS:
        values = [metrics.get(full_name(group, metric.name)) for group in TABLE_GROUPS]
        if any(value is not None for value in values):
            for column, value in enumerate(values[1:], start=2):
                if value is not None and values[0] is not None and round(value - values[0], metric.digits):
                    better = metric.best(value, values[0]) == value
                    classes[len(rows), column] = "better" if better else "worse"
            rows.append([metric.title, *("" if value is None else f"{value:.{metric.digits}f}" for value in values)])
    return Table(["", *TABLE_GROUPS], rows, range(1, 1 + len(TABLE_GROUPS)), classes)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
