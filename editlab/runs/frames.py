"""The numbers of a run as pandas frames: its metrics, the outcome of each edit, and its events.

pandas is not needed for anything else, so it is imported at the first frame, and it is an extra of editlab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editlab.errors import UserError
from editlab.metrics.names import BEFORE, IMMEDIATE, RETAINED, of_group
from editlab.runs.event_log import EventLog
from editlab.runs.tables import metric_table

if TYPE_CHECKING:
    from pandas import DataFrame

EVENTS = "*_events.jsonl"
"""Pattern of the names of event logs."""


class RunFrames(ABC):
    """What can be read of a run, whether from its folder (:class:`editlab.Run`) or right after ``edit_model``."""

    summary: Any
    """what a run writes to ``summary.json``; its ``metrics`` are named ``group/metric``, such as ``retained/ES``"""

    @property
    def before(self) -> dict[str, float]:
        """ES, PS, NS, accuracies and so on of the facts on the unedited model, and its perplexity."""
        return of_group(self.summary["metrics"], BEFORE)

    @property
    def immediate(self) -> dict[str, float]:
        """The metrics of each fact right after its own batch."""
        return of_group(self.summary["metrics"], IMMEDIATE)

    @property
    def retained(self) -> dict[str, float]:
        """The metrics of all edits that are in the weights, after the last of them."""
        return of_group(self.summary["metrics"], RETAINED)

    def __str__(self) -> str:
        """The metrics before, right after, and at the end, as a table."""
        return metric_table(self.summary["metrics"]).to_text()

    @cached_property
    def metrics(self) -> DataFrame:
        """The table of metrics: a row for each number of edits (the index), a column for each ``group/metric``.

        Raises:
            UserError: if pandas is not installed, or the run has no table of metrics that can be read.
        """
        pandas = _pandas()
        frame = pandas.DataFrame.from_dict(self._curve(), orient="index", dtype="float64")
        return frame.sort_index().sort_index(axis="columns").rename_axis("edits")

    @cached_property
    def outcomes(self) -> DataFrame:
        """The outcome of each edit (:mod:`editlab.runs.outcomes`): a row for each, its number from 1 as the index.

        Counts and hits are of type ``Int64``, whose missing value is ``pandas.NA``; numbers are ``float64`` and texts
        ``object``. The facts' identifiers are texts.

        Raises:
            UserError: if pandas is not installed, or the run has no outcomes that can be read.
        """
        pandas = _pandas()
        rows = self._outcome_rows()
        columns = dict.fromkeys(name for row in rows for name in row)
        series = {name: _series(pandas, [row.get(name) for row in rows]) for name in columns}
        return pandas.DataFrame(series).set_index("edit") if series else pandas.DataFrame()

    @cached_property
    def events(self) -> DataFrame:
        """The events of all callbacks' logs, such as ``trust_events.jsonl``: a row for each, with the log's name.

        A field that an event lacks is missing in its row. A run without such callbacks has no rows.

        Raises:
            UserError: if pandas is not installed.
        """
        pandas = _pandas()
        found = list(self._event_rows())
        return pandas.DataFrame(found, columns=None if found else ["log", "step"])

    @abstractmethod
    def _curve(self) -> Mapping[int, Mapping[str, float]]:
        """Return number of edits -> ``group/metric`` -> value."""

    @abstractmethod
    def _outcome_rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows of :func:`editlab.runs.outcomes.read_outcomes`."""

    @abstractmethod
    def _event_rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows of :func:`event_rows`."""


def event_rows(folder: Path) -> list[dict[str, Any]]:
    """The events of all logs in a run's folder, each with the name of its log, such as ``trust``."""
    return [
        {"log": file.stem.removesuffix("_events"), **event}
        for file in sorted(folder.glob(EVENTS))
        for event in EventLog(file).read()
    ]


def _series(pandas: Any, values: list[Any]) -> Any:
    """A column whose type follows from its values."""
    kinds = {type(value) for value in values if value is not None}
    kind = "Int64" if kinds == {int} else "float64" if kinds == {float} else "object"
    return pandas.Series(values, dtype=kind)


def _pandas() -> Any:
    """The package pandas.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("Frames need the package pandas: pip install 'editlab[pandas]'.") from error
    return pandas
