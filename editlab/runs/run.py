"""A run that is read from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from editlab.errors import UserError
from editlab.runs.folders import CONFIG, SUMMARY, TABLE, RunFolder
from editlab.runs.frames import RunFrames, event_rows
from editlab.runs.outcomes import FILE as OUTCOMES


class Run(RunFrames):
    """A run of ``editlab fit`` or of ``edit_model``, read from its folder; each part is read when it is first used.

    Args:
        path: the run's folder, such as ``lightning_logs/emmet_replay/version_0``.

    Raises:
        UserError: if there is no such folder, or it is not a run's.

    Here ``folder`` is that of a run that edited two facts, one after the other, and forgot the first:

    >>> from editlab import Run
    >>> run = Run(folder)
    >>> run.retained["accuracy"]
    0.5
    >>> run.metrics["immediate/accuracy"].to_dict()  # number of edits -> value
    {1: 1.0, 2: 1.0}
    >>> list(run.outcomes.query("`immediate/hit` == 1 and `retained/hit` == 0").subject)
    ['Mount Fuji']
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

    def _curve(self) -> Mapping[int, Mapping[str, float]]:
        if not (self.path / TABLE).is_file():
            raise UserError(
                f"There is no {self.path / TABLE}: the run had no RunLogger or CSVRunLogger among its loggers; "
                "run it again."
            )
        return self.folder.curve

    def _outcome_rows(self) -> Sequence[Mapping[str, Any]]:
        return self.folder.outcomes

    def _event_rows(self) -> Sequence[Mapping[str, Any]]:
        return event_rows(self.path)
