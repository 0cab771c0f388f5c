"""The default logger: TensorBoard, and the same numbers as one CSV table; and a logger for runs without a folder.

In TensorBoard each group of metrics is a run of its own inside the run's folder (``version_0/before``,
``version_0/immediate``, ``version_0/retained``) with the same names (``scores/ES``), because TensorBoard draws several
runs in one chart, each in its color, if a name is the same.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.metrics.names import GROUPS
from editlab.utils import compat
from editlab.utils.files import atomic_file

OPENING = ("events.out.tfevents.*", "hparams.yaml", "config.yaml", ".lock")
"""Files in a run's folder before anything is measured."""

SCORES = "scores"
"""First part of the names of the metrics of all groups in TensorBoard, such as ``scores/ES``."""


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger that also writes ``metrics.csv``: a row per number of edits, a column per metric.

    A cell is empty if the metric was not measured at that number of edits. Checkpoints hold the rows, so the table of a
    resumed run equals that of an uninterrupted one.

    Args:
        save_dir: the folder of all runs.
        name: the recipe's folder in it; the command line uses the name of the config file.
        version: the run's folder; default: ``version_N`` with the next free number.
    """

    DEFAULT_NAME = "editlab"
    DEFAULT_FOLDER = "lightning_logs"

    def __init__(
        self,
        save_dir: str = DEFAULT_FOLDER,
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
    ) -> None:
        super().__init__(save_dir, name=name, version=version, default_hp_metric=False)
        self._number = version
        self._rows: dict[int, dict[str, float]] | None = None
        self._read_at: int | None = None
        self._written = True
        self._left = False
        self._groups: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groups": {}}  # open files cannot be copied to another process

    @property
    def version(self) -> int | str:
        """The run's number, or the name of its folder; a number that was not given is reserved at the first use.

        Only rank 0 reserves one. On the other ranks this is the next free number until :meth:`share` is called.

        Raises:
            UserError: if the folder of all runs cannot be made.
        """
        if self._number is not None:
            return self._number
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return compat.next_version(self)
        self._number = self._reserve()
        return self._number

    def _reserve(self) -> int:
        """Makes the folder of the next free number; if two runs start at once, only one of them can make it."""
        runs = Path(os.path.expandvars(self.root_dir)).expanduser()
        number = compat.next_version(self)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    (runs / f"version_{number}").mkdir()
                    return number
                except FileExistsError:
                    number += 1
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{runs} cannot be the folder of the runs, because a file is in its way: choose another "
                "trainer.logger.init_args.save_dir."
            ) from error

    def share(self) -> None:
        """Gives every rank the version of rank 0; all ranks must call it."""
        self._number = ranks.on_first(lambda: self.version)

    @property
    def table_path(self) -> Path:
        """Path of ``metrics.csv`` in the run's folder."""
        return Path(self.log_dir) / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at a number of edits (``step``) to TensorBoard and to the table."""
        numbers = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if self._read_at is not None:
            step = self._read_at
            numbers = {k: v for k, v in numbers.items() if k not in self.rows.get(step, {})}
        groups = {name: name.partition("/")[0] for name in numbers}
        super().log_metrics({name: value for name, value in numbers.items() if groups[name] not in GROUPS}, step)
        for name, value in numbers.items():
            if (group := groups[name]) in GROUPS:
                self._writer(group).add_scalar(SCORES + name.removeprefix(group), value, step)
        if step is not None and numbers:
            self.rows.setdefault(step, {}).update(numbers)
            self._written = False

    def _writer(self, group: str) -> Any:
        """Return the event file of a group, in the group's folder inside the run's."""
        if group not in self._groups:
            self._groups[group] = compat.event_file(self, Path(self.log_dir) / group)
        return self._groups[group]

    @rank_zero_only
    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the run's settings for TensorBoard's HParams page, which shows them next to the last metrics.

        Args:
            settings: dotted name -> value; a list or a mapping is shown as JSON, and null is left out.
        """
        shown = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            for name, value in settings.items()
            if value is not None
        }
        compat.add_hyperparameters(self, shown, f"{self.name}/{self.version}")

    def read_at(self, edits: int) -> None:
        """Logs all later numbers at ``edits``, where a finished run stands; what it has measured there stays."""
        self._read_at = edits

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """The table so far: number of edits -> name -> value."""
        if self._rows is None:
            self._rows = read_table(self.table_path)
        return self._rows

    @rank_zero_only
    def resume(self, rows: Mapping[int, Mapping[str, float]], edits: int) -> None:
        """Resumes the table of a run after a number of edits; later rows are dropped.

        TensorBoard will ignore the later points of existing event files. Must be called before anything is logged.
        """
        compat.close_event_file(self)  # Lightning opens one early, and only a new one can have a step to purge from
        for writer in self._groups.values():
            writer.close()
        self._groups.clear()
        self._rows = {int(step): dict(row) for step, row in rows.items()}
        self._written = False
        compat.purge_events_from(self, edits + 1)
        for group in GROUPS:
            if (Path(self.log_dir) / group).is_dir():
                self._writer(group)

    @rank_zero_only
    def leave(self) -> None:
        """Writes nothing from now on, and removes the event file that this process has opened in the folder."""
        self._left = True
        compat.close_event_file(self, remove=True)

    @rank_zero_only
    def save(self) -> None:
        """Writes the buffer of the event file, and the table."""
        if self._left:
            return
        super().save()
        for writer in (self.experiment, *self._groups.values()):
            writer.flush()
        if not self._written and (self.rows or self.table_path.exists()):
            _write(self.table_path, self.rows)
            self._written = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes everything, also if the run failed; the folder of a run that failed before measuring is removed."""
        if self._left:
            return
        if status == "failed" and not self.rows and self._holds_nothing():
            compat.close_event_file(self)
            shutil.rmtree(self.log_dir, ignore_errors=True)
            return
        self.save()
        super().finalize(status)
        for writer in self._groups.values():
            writer.close()

    def _holds_nothing(self) -> bool:
        """Whether the folder exists and has only the files that every run starts with."""
        folder = Path(self.log_dir)
        return folder.is_dir() and all(any(map(path.match, OPENING)) for path in folder.iterdir())


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


def read_table(path: Path) -> dict[int, dict[str, float]]:
    """Reads a run's ``metrics.csv``: number of edits -> name -> value of what was measured; {} if there is no file.

    Raises:
        UserError: if it is damaged, or was written by another program.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row.pop("edits")): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # a missing column, too many cells, or not a number
        raise UserError(f"{path} is damaged or not one of editlab's: leave the run out, or run it again.") from error


def _write(path: Path, rows: dict[int, dict[str, Any]]) -> None:
    columns = sorted({name for row in rows.values() for name in row})
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["edits", *columns])
        writer.writeheader()
        for step in sorted(rows):
            writer.writerow({"edits": step, **rows[step]})
