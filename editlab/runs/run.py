"""A run's folder as pandas frames: its metrics, the outcome of each edit, and its events.

pandas is not needed for anything else, so it is imported at the first frame, and it is an extra of editlab.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from editlab.errors import UserError
from editlab.runs.event_log import EventLog
from editlab.runs.folders import CONFIG, SUMMARY, TABLE, RunFolder
from editlab.runs.outcomes import FILE as OUTCOMES

if TYPE_CHECKING:
    from pandas import DataFrame

EVENTS = "*_events.jsonl"
"""Pattern of the names of event logs."""


class Run:
    """A run of ``editlab fit``, read from its folder; each part is read when it is first used.

    Args:
        path: the run's folder, such as ``lightning_logs/emmet_replay/version_0``.

    Raises:
        UserError: if there is no such folder, or it is not a run's.

    Example::

        run = editlab.Run("lightning_logs/emmet_replay/version_0")
        run.metrics["retained/accuracy"].dropna()          # the forgetting curve
        run.outcomes.query("`immediate/hit` == 1 and `retained/hit` == 0")  # the edits that were forgotten
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        if not self.path.is_dir():
            raise UserError(f"There is no folder {str(path)!r}: give a run's, such as lightning_logs/emmet/version_0.")
        if not any((self.path / name).is_file() for name in (SUMMARY, TABLE, OUTCOMES)):
            below = sorted(file.parent for file in self.path.glob(f"*/{TABLE}"))
            such = f", such as {below[-1]}" if below else ""
            raise UserError(f"{path} is not a run's folder, as it has no {TABLE}: give a run's own folder{such}.")

    def __repr__(self) -> str:
        """The call that reads this run."""
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of ``summary.json``; None in it stands for a number that is not finite.

        Raises:
            UserError: if the run has not finished, or the file is damaged.
        """
        found = self.folder.summary
        if found is None:
            raise UserError(f"{self.path} has no {SUMMARY}: the run has not finished; --ckpt_path last resumes it.")
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The complete recipe, ``config.yaml``, as nested dicts and lists.

        Raises:
            UserError: if there is no such file, as of a run by ``edit_model``, or it is damaged.
        """
        file = self.path / CONFIG
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"There is no {file}: editlab fit writes it, and edit_model does not; read summary instead."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not valid YAML: correct the file, or run it again.") from error
        if not isinstance(loaded, Mapping):
            raise UserError(f"{file} is not a recipe: correct the file, or run it again.")
        return dict(loaded)

    @cached_property
    def metrics(self) -> DataFrame:
        """The table of metrics: a row for each number of edits (the index), a column for each ``group/metric``.

        Raises:
            UserError: if there is no ``metrics.csv``, it is damaged, or pandas is not installed.
        """
        pandas = _pandas()
        if not (self.path / TABLE).is_file():
            raise UserError(
                f"There is no {self.path / TABLE}: the run had no RunLogger or CSVRunLogger among its loggers; "
                "run it again."
            )
        frame = pandas.DataFrame.from_dict(self.folder.curve, orient="index", dtype="float64")
        return frame.sort_index().sort_index(axis="columns").rename_axis("edits")

    @cached_property
    def outcomes(self) -> DataFrame:
        """The outcome of each edit (:mod:`editlab.runs.outcomes`): a row for each, its number from 1 as the index.

        Counts and hits are of type ``Int64``, whose missing value is ``pandas.NA``; numbers are ``float64`` and texts
        ``object``. The facts' identifiers are texts.

        Raises:
            UserError: if there is no ``outcomes.csv``, it is damaged, or pandas is not installed.
        """
        pandas = _pandas()
        rows = self.folder.outcomes
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
        found = [
            {"log": file.stem.removesuffix("_events"), **event}
            for file in sorted(self.path.glob(EVENTS))
            for event in EventLog(file).read()
        ]
        return pandas.DataFrame(found, columns=None if found else ["log", "step"])


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
