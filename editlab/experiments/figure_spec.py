"""The part of an experiment's schema that describes figures; each is drawn from one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Color: TypeAlias = Literal["blue", "orange", "green", "vermilion", "purple", "sky", "black"]


@dataclass(frozen=True)
class LineSpec:
    """How a case is drawn."""

    label: str
    color: Color = "black"
    line: str = "-"
    """line style of matplotlib; ``none`` draws points alone"""


@dataclass(frozen=True)
class CurvesSpec:
    """Retained ES, accuracy, NS and perplexity over edits, a line for each case; bands are the range over seeds."""

    kind: Literal["curves"]
    file: str
    table: str
    rows: tuple[Mapping[str, LineSpec], ...]
    """of panels: case -> its line"""


@dataclass(frozen=True)
class LinesSpec:
    """One panel for each column, one line for each group, over a column of whole numbers (in powers of two)."""

    kind: Literal["lines"]
    file: str
    table: str
    x: str
    xlabel: str
    group: str
    """column whose values are the groups"""
    label: str
    """of a group: ``"replay rate {}"``"""
    panels: Mapping[str, str]
    """column -> title"""
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeatMapSpec:
    """One heat map for each column."""

    kind: Literal["heat_map"]
    file: str
    table: str
    x: str
    xlabel: str
    y: str
    ylabel: str
    panels: Mapping[str, str]
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BarsSpec:
    """One panel for each column, one bar for each case."""

    kind: Literal["bars"]
    file: str
    table: str
    cases: Mapping[str, str]
    """case -> label"""
    panels: Mapping[str, str]


@dataclass(frozen=True)
class FrontierSpec:
    """What a family of settings trades: one panel for each column over the column ``x``, one line for each family."""

    kind: Literal["frontier"]
    file: str
    table: str
    x: str
    xlabel: str
    families: Mapping[str, Mapping[str, str]]
    """label of a line -> case -> name of its point, in the order of the line"""
    panels: Mapping[str, str]
    """column -> title"""


@dataclass(frozen=True)
class RadarPanel:
    """One radar: some rows, and the group of metrics that is drawn."""

    title: str
    metrics: Literal["retained", "immediate"]
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RadarSpec:
    """One radar for each panel, one line for each label in it."""

    kind: Literal["radar"]
    file: str
    table: str
    label: str
    """of a row, from its columns: ``"{method}, weight {effective_weight:g}"``; rows that lack one are left out"""
    spokes: Mapping[str, str]
    """metric -> name of its spoke"""
    panels: tuple[RadarPanel, ...]


@dataclass(frozen=True)
class RocSpec:
    """ROC curves, and precision over recall."""

    kind: Literal["roc"]
    file: str
    table: str


@dataclass(frozen=True)
class RunsFigureSpec:
    """A figure that a function draws from the runs themselves, and not from a table."""

    kind: Literal["runs"]
    file: str
    draw: str
    """import path of a function of the finished runs that returns a figure"""


FigureSpec: TypeAlias = (
    CurvesSpec | LinesSpec | HeatMapSpec | BarsSpec | FrontierSpec | RadarSpec | RocSpec | RunsFigureSpec
)
