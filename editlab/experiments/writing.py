"""Experiments on sequences of edits: from the command line to their tables and the figure of their curves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweep import (
    Case,
    Run,
    add_texts,
    at_hand,
    common_flags,
    exit_where_failed,
    in_a_sentence,
    parser,
    planned,
    run_all,
)
from tables import Row, curves_figure, means, snapshots, table_rows, update_table, write_rows

from editlab.runs.figures import save_figure


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """An experiment, and what it writes: a row a run, a row a case, a row a snapshot, and the curves."""

    recipe: str
    """that its cases start from"""
    work: Path
    """folder of its runs"""

    each: str
    over_seeds: str
    curves: str
    """names of the three tables in ``results/``"""
    figure: str
    """name of the figure in ``figs/``, drawn from the third"""
    shown: Sequence[Mapping[str, tuple[str, str, str]]]
    """case -> label, color, line, of those that are drawn; several are rows of panels"""
    otherwise: str
    """the case that others are held against"""
    base: Mapping[str, str] = field(default_factory=dict)
    """case -> another that it is held against"""
    also: tuple[str, Callable[[Sequence[Row], Sequence[Row]], list[Row]]] | None = None
    """name of one more table in ``results/``, and what makes it of the rows of snapshots and of runs"""

    def write(self, runs: Sequence[Run], cases: Collection[str], out: Path) -> None:
        """Takes the runs at hand into the tables, and draws the curves anew.

        Args:
            runs: those that have a result.
            cases: names of all cases, in their order.
            out: folder of ``results/`` and ``figs/``.
        """
        results = out / "results"
        each = update_table(results / self.each, table_rows(runs), cases)
        write_rows(means(each, self.base, self.otherwise, cases), results / self.over_seeds)
        curves = update_table(results / self.curves, snapshots(runs), cases)
        if self.also is not None:
            name, make = self.also
            write_rows(make(curves, each), results / name)
        figure = curves_figure(curves, self.shown)
        if figure is not None:
            save_figure(figure, out / "figs" / f"{self.figure}.png")

    @in_a_sentence
    def main(self, description: str | None, cases: Callable[[int], list[Case]], **defaults: Any) -> None:
        """The command line: runs what is missing; writes the tables and the figure.

        Args:
            description: of the script.
            cases: number of edits -> all cases, the ones that matter most first.
            **defaults: of the arguments, where they are not those of every experiment.
        """
        shared = parser(description, work=self.work, **defaults)
        add_texts(shared)
        options = shared.parse_args()
        common = common_flags(options)
        wanted = [case.over(common) for case in cases(options.edits)]
        runs = planned(wanted, self.recipe, options)
        done = run_all(runs, options, at_hand(wanted, self.recipe, options))
        if done:
            self.write(done, [case.name for case in wanted], options.out)
        exit_where_failed(runs, options)
