"""The default logger: TensorBoard, and the same numbers as one table in the same folder."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from editlab import compat
from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.utils.files import atomic_file

OPENING = ("events.out.tfevents.*", "hparams.yaml", "config.yaml")
"""What lies in a run's folder before anything is measured."""


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger that also keeps ``metrics.csv``: one row for each number of edits, one column a metric.

    What was not measured at some number of edits is an empty cell. Checkpoints hold the rows, so a resumed run's table
    is that of a run never stopped.

    Args:
        save_dir: the folder of all runs.
        name: the recipe's folder in it; the command line puts the config file's name here.
        version: the run's folder; ``version_N`` with the next free number where not given.
    """

    DEFAULT_NAME = "editlab"

    def __init__(
        self,
        save_dir: str = "lightning_logs",
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
    ) -> None:
        super().__init__(save_dir, name=name, version=version, default_hp_metric=False)
        self._number = version
        self._rows: dict[int, dict[str, float]] | None = None
        self._read_at: int | None = None
        self._written = True

    @property
    def version(self) -> int | str:
        """The run's number, or its folder's name; a number that nobody gave is claimed where it is first asked for.

        Only rank 0 claims one. Until :meth:`share`, the others tell the next free number.

        Raises:
            UserError: where the folder of all runs can not be made.
        """
        if self._number is not None:
            return self._number
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return compat.next_version(self)
        self._number = self._claim()
        return self._number

    def _claim(self) -> int:
        """The next number of which no run has a folder, by making it: of two runs that begin at once, one can."""
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
                f"{runs} can not be the folder of the runs, for a file is in its way: choose another "
                "trainer.logger.init_args.save_dir."
            ) from error

    def share(self) -> None:
        """Gives every rank the first one's version; all of them have to call it."""
        self._number = ranks.on_first(lambda: self.version)

    @property
    def table_path(self) -> Path:
        """``metrics.csv`` in the run's folder."""
        return Path(self.log_dir) / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds scalars at a number of edits to TensorBoard and to the table."""
        numbers = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if self._read_at is not None:
            step = self._read_at
            numbers = {k: v for k, v in numbers.items() if k not in self.rows.get(step, {})}
        super().log_metrics(numbers, step)
        if step is not None and numbers:
            self.rows.setdefault(step, {}).update(numbers)
            self._written = False

    def read_at(self, edits: int) -> None:
        """From here on a run that has been is looked at, after so many edits: what it has measured there stays."""
        self._read_at = edits

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """The table: number of edits -> name -> value."""
        if self._rows is None:
            self._rows = read_table(self.table_path)
        return self._rows

    @rank_zero_only
    def go_on(self, rows: Mapping[int, Mapping[str, float]], edits: int) -> None:
        """Takes up the table of a run at a number of edits; what lies in the folder beyond it will be made anew.

        TensorBoard is told to leave out later points of event files that are there; call it before anything is logged.
        """
        compat.close_event_file(self)  # Lightning opens one early, and only a new one can have a step to purge from
        self._rows = {int(step): dict(row) for step, row in rows.items()}
        self._written = False
        compat.purge_events_from(self, edits + 1)

    @rank_zero_only
    def save(self) -> None:
        """Writes the event file's buffer and the table."""
        super().save()
        self.experiment.flush()
        if not self._written:
            _write(self.table_path, self.rows)
            self._written = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes all that is left, also where the run failed; one that failed with nothing to show leaves no folder."""
        if status == "failed" and not self.rows and self._holds_nothing():
            compat.close_event_file(self)
            shutil.rmtree(self.log_dir, ignore_errors=True)
            return
        self.save()
        super().finalize(status)

    def _holds_nothing(self) -> bool:
        """Whether there is a folder with no more in it than what every run opens with."""
        folder = Path(self.log_dir)
        return folder.is_dir() and all(any(map(path.match, OPENING)) for path in folder.iterdir())


def read_table(path: Path) -> dict[int, dict[str, float]]:
    """A run's ``metrics.csv``: number of edits -> name -> value, what was measured alone; {} where there is none.

    Raises:
        UserError: where it is damaged, or another program's.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row.pop("edits")): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # no such column, a cell too many, no number
        raise UserError(f"{path} is damaged or not one of editlab's: leave the run out, or run it again.") from error


def _write(path: Path, rows: dict[int, dict[str, Any]]) -> None:
    columns = sorted({name for row in rows.values() for name in row})
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["edits", *columns])
        writer.writeheader()
        for step in sorted(rows):
            writer.writerow({"edits": step, **rows[step]})
