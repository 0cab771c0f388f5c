"""The default logger: TensorBoard, and the same numbers as one CSV table; and a logger for runs without a folder.

In TensorBoard each group of metrics is a run of its own inside the run's folder (``version_0/before``,
``version_0/immediate``, ``version_0/retained``) with the same names (``scores/ES``), because TensorBoard draws several
runs in one chart, each in its color, if a name is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from editlab.metrics.names import GROUPS
from editlab.runs.run_table import DEFAULT_FOLDER, DEFAULT_NAME, RunTable
from editlab.utils import compat
from editlab.utils.files import expanded

SCORES = "scores"
"""First part of the names of the metrics of all groups in TensorBoard, such as ``scores/ES``."""


class RunLogger(RunTable, TensorBoardLogger):
    """Lightning's TensorBoard logger that also writes ``metrics.csv``: a row per number of edits, a column per metric.

    Args:
        save_dir: the folder of all runs.
        name: the recipe's folder in it; the command line uses the name of the config file.
        version: the run's folder; default: ``version_N`` with the next free number.
    """

    def __init__(
        self,
        save_dir: str = DEFAULT_FOLDER,
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
    ) -> None:
        super().__init__(expanded(save_dir), name=name, version=version, default_hp_metric=False)
        self._number = version
        self._groups: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groups": {}}  # open files cannot be copied to another process

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at a number of edits (``step``) to TensorBoard and to the table."""
        numbers, step = self.put(metrics, step)
        groups = {name: name.partition("/")[0] for name in numbers}
        super().log_metrics({name: value for name, value in numbers.items() if groups[name] not in GROUPS}, step)
        for name, value in numbers.items():
            if (group := groups[name]) in GROUPS:
                self._writer(group).add_scalar(SCORES + name.removeprefix(group), value, step)

    def _writer(self, group: str) -> Any:
        """Return the event file of a group, in the group's folder inside the run's."""
        if group not in self._groups:
            self._groups[group] = compat.event_file(self, Path(self.log_dir) / group)
        return self._groups[group]

    @rank_zero_only
    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the run's settings for TensorBoard's HParams page, which shows them next to the last metrics.

        Args:
            settings: dotted name -> value.
        """
        compat.add_hyperparameters(self, as_parameters(settings), f"{self.name}/{self.version}")

    @rank_zero_only
    def resume(self, rows: Mapping[int, Mapping[str, float]], edits: int) -> None:
        """Resumes the table of a run after a number of edits; later rows are dropped.

        TensorBoard will ignore the later points of existing event files. Must be called before anything is logged.
        """
        compat.close_event_file(self)  # Lightning opens one early, and only a new one can have a step to purge from
        for writer in self._groups.values():
            writer.close()
        self._groups.clear()
        super().resume(rows, edits)
        compat.purge_events_from(self, edits + 1)
        for group in GROUPS:
            if (Path(self.log_dir) / group).is_dir():
                self._writer(group)

    @rank_zero_only
    def leave(self) -> None:
        """Writes nothing from now on, and removes the event file that this process has opened in the folder."""
        super().leave()
        compat.close_event_file(self, remove=True)

    @rank_zero_only
    def save(self) -> None:
        """Writes the buffer of the event file, and the table."""
        if self._left:
            return
        TensorBoardLogger.save(self)
        for writer in (self.experiment, *self._groups.values()):
            writer.flush()
        super().save()

    def close(self) -> None:
        """Closes the event file."""
        compat.close_event_file(self)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes everything, also if the run failed; the folder of a run that failed before measuring is removed."""
        super().finalize(status)
        if self._left or not Path(self.log_dir).is_dir():
            return
        TensorBoardLogger.finalize(self, status)
        for writer in self._groups.values():
            writer.close()


class RowLogger(Logger):
    """Keeps the rows of ``metrics.csv`` in memory, for a run that leaves no folder; it writes nothing.

    Attributes:
        rows: number of edits -> name -> value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> None:
        """None, because the run has no recipe."""

    @property
    def version(self) -> None:
        """None, because the run has no folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds numbers to the row of a number of edits (``step``)."""
        numbers = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if step is not None and numbers:
            self.rows.setdefault(step, {}).update(numbers)

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Does nothing: the caller of the run has its settings."""


def as_parameters(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as loggers show them: a list or a mapping is JSON, and null is left out.

    Args:
        settings: dotted name -> value.
    """
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
        for name, value in settings.items()
        if value is not None
    }
