"""The table of a run's numbers, ``metrics.csv``, and the loggers' part that reserves a run's folder and writes it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.utils import compat
from editlab.utils.files import atomic_file, expanded

OPENING = ("events.out.tfevents.*", "hparams.yaml", "config.yaml", ".lock")
"""Files in a run's folder before anything is measured."""

DEFAULT_NAME = "editlab"
"""Name of the folder of runs without a recipe."""

DEFAULT_FOLDER = "lightning_logs"
"""Folder of all runs."""


class RunTable:
    """Base class to list before a logger of Lightning's that has a folder for each run: it keeps ``metrics.csv`` there.

    The table has a row per number of edits and a column per metric; a cell is empty if the metric was not measured at
    that number of edits. Checkpoints hold the rows, so the table of a resumed run equals that of an uninterrupted one.
    """

    root_dir: str
    log_dir: str
    _number: int | str | None
    _rows: dict[int, dict[str, float]] | None = None
    _read_at: int | None = None
    _written = True
    _left = False

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
        runs = Path(self.root_dir)
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

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """The table so far: number of edits -> name -> value."""
        if self._rows is None:
            self._rows = read_table(self.table_path)
        return self._rows

    def read_at(self, edits: int) -> None:
        """Logs all later numbers at ``edits``, where a finished run stands; what it has measured there stays."""
        self._read_at = edits

    def put(self, metrics: Mapping[str, float], step: int | None) -> tuple[dict[str, float], int | None]:
        """Puts numbers into the table, and returns those that were put there, with their number of edits.

        Args:
            metrics: value of each name.
            step: number of edits; numbers without one have no row.
        """
        numbers = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if self._read_at is not None:
            step = self._read_at
            numbers = {k: v for k, v in numbers.items() if k not in self.rows.get(step, {})}
        if step is not None and numbers:
            self.rows.setdefault(step, {}).update(numbers)
            self._written = False
        return numbers, step

    @rank_zero_only
    def resume(self, rows: Mapping[int, Mapping[str, float]], edits: int) -> None:
        """Resumes the table of a run after a number of edits; later rows are dropped.

        Must be called before anything is logged.
        """
        self._rows = {int(step): dict(row) for step, row in rows.items()}
        self._written = False

    @rank_zero_only
    def leave(self) -> None:
        """Writes nothing from now on."""
        self._left = True

    @rank_zero_only
    def save(self) -> None:
        """Writes the table, if anything is new."""
        if not self._left and not self._written and (self.rows or self.table_path.exists()):
            _write(self.table_path, self.rows)
            self._written = True

    def close(self) -> None:
        """Closes what is open in the run's folder."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes everything, also if the run failed; the folder of a run that failed before measuring is removed."""
        if self._left:
            return
        if status == "failed" and not self.rows and self._holds_nothing():
            self.close()
            shutil.rmtree(self.log_dir, ignore_errors=True)
            return
        self.save()

    def _holds_nothing(self) -> bool:
        """Whether the folder exists and has only the files that every run starts with."""
        folder = Path(self.log_dir)
        return folder.is_dir() and all(any(map(path.match, OPENING)) for path in folder.iterdir())


class CSVRunLogger(RunTable, CSVLogger):
    """Logger that writes ``metrics.csv`` alone, without files for TensorBoard.

    The command line also puts it before other loggers, such as those of Weights & Biases and MLflow, so that every run
    has its folder and its table.

    Args:
        save_dir: the folder of all runs.
        name: the recipe's folder in it; the command line uses the name of the config file.
        version: the run's folder; default: ``version_N`` with the next free number.
    """

    def __init__(
        self, save_dir: str = DEFAULT_FOLDER, name: str | None = DEFAULT_NAME, version: int | str | None = None
    ) -> None:
        super().__init__(expanded(save_dir), name=name, version=version)
        self._number = version

    @property
    def experiment(self) -> Any:
        """The table; Lightning's own writer of a table would delete the run's when it is resumed."""
        return self.rows

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Does nothing: the settings are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Puts numbers at a number of edits (``step``) into the table."""
        self.put(metrics, step)


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
