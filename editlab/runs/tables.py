"""Tables of a run, made once and written as plain text, Markdown or HTML; among them the table of its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from editlab.metrics.names import (
    METRICS,
    PERPLEXITY,
    PERPLEXITY_HIGH,
    PERPLEXITY_LOW,
    PERPLEXITY_START,
    PORTABILITY,
    TABLE_GROUPS,
    MetricName,
    full_name,
    generation_name,
    of_group,
    perplexity_name,
    portability_name,
)

WIDEST = 4
"""Number of columns that fit on the screen of a phone."""


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --better: #006b4d; --worse: #a63c00; }
@media (prefers-color-scheme: dark) { :root { --better: #4fd1a5; --worse: #ff9a5c; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.better { color: var(--better); } .worse { color: var(--worse); }
td.better::after { content: "\\00a0\\2713"; } td.worse::after { content: "\\00a0\\2717"; }
@media (max-width: 40rem) {
  th, td { padding-right: .5rem; }
  table.cards, table.cards tbody, table.cards tr, table.cards td { display: block; }
  table.cards thead { display: none; }
  table.cards tr { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; padding: .3rem .6rem; }
  table.cards td { text-align: left; border: 0; padding: .1rem 0; overflow-wrap: anywhere; }
  table.cards td:empty { display: none; }
  table.cards td::before { content: attr(data-label) "  "; opacity: .65; font-size: .8rem; }
}
"""
"""Style sheet of a page with tables, for wide and for narrow screens, in light and in dark colors."""


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

    def without_empty(self) -> Table:
        """The same table without the columns in which no row has a text."""
        kept = [i for i in range(len(self.header)) if any(row[i] for row in self.rows)]
        return Table(
            [self.header[i] for i in kept],
            [[row[i] for i in kept] for row in self.rows],
            [new for new, old in enumerate(kept) if old in self.numbers],
            {(row, kept.index(i)): name for (row, i), name in self.classes.items() if i in kept},
        )

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


def three_decimals(value: float | None) -> str:
    """A number as a cell; empty if it was not measured."""
    return "" if value is None else f"{value:.3f}"


def metric_table(metrics: Mapping[str, float | None], full: bool = False) -> Table:
    """The metrics of one run: a row for each metric that was measured, a column for each group.

    Of a portability group the answers have a row, or the accuracy if there are no answers.

    In HTML, values after an edit have the class ``better`` or ``worse`` where they differ from those before it.

    Args:
        metrics: ``group/metric`` -> value, as ``summary.json`` has it; None for a number that is not finite.
        full: with the rows that the summary on the screen leaves out.

    >>> print(metric_table({"before/ES": 0.0, "retained/ES": 0.875}).to_markdown())
    |  | before | immediate | retained |
    | --- | ---: | ---: | ---: |
    | ES | 0.000 |  | 0.875 |
    """
    rows: list[list[str]] = []
    classes: dict[tuple[int, int], str] = {}
    for metric in _rows(metrics, full):
        values = [metrics.get(full_name(group, metric.name)) for group in TABLE_GROUPS]
        if any(value is not None for value in values):
            for column, value in enumerate(values[1:], start=2):
                if value is not None and values[0] is not None and round(value - values[0], metric.digits):
                    better = metric.best(value, values[0]) == value
                    classes[len(rows), column] = "better" if better else "worse"
            rows.append([metric.title, *("" if value is None else f"{value:.{metric.digits}f}" for value in values)])
        if metric.name == PERPLEXITY and any(intervals := [_interval(metrics, group) for group in TABLE_GROUPS]):
            rows.append(["  its 95% interval", *intervals])
    return Table(["", *TABLE_GROUPS], rows, range(1, 1 + len(TABLE_GROUPS)), classes)


def _rows(metrics: Mapping[str, Any], full: bool) -> Iterator[MetricName]:
    """The metrics that the table of a run has: those of every run, those of its texts, and those of its questions."""
    names = dict.fromkeys(name for group in TABLE_GROUPS for name in of_group(metrics, group))
    for metric in METRICS:
        if metric.main or full:
            yield metric
        if metric.name == PERPLEXITY:
            known = (PERPLEXITY_START, PERPLEXITY_LOW, PERPLEXITY_HIGH)
            texts = [name for name in names if name.startswith(perplexity_name("")) and name not in known]
            for name in texts if full or len(texts) > 1 else ():  # the first text's stands above
                yield MetricName(name, f"perplexity of {name.removeprefix(perplexity_name(''))}", "lower", 2)
    for name in names:
        if not name.startswith(f"{PORTABILITY}/"):
            continue
        group, _, score = name.removeprefix(f"{PORTABILITY}/").rpartition("/")
        answered = generation_name(portability_name(group)) in names
        if score == "generation" or (score == "accuracy" and (full or not answered)):
            yield MetricName(name, f"{group}, {score}")


def _interval(metrics: Mapping[str, float | None], group: str) -> str:
    ends = [metrics.get(full_name(group, name)) for name in (PERPLEXITY_LOW, PERPLEXITY_HIGH)]
    return "" if None in ends else " to ".join(f"{end:.1f}" for end in ends)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
