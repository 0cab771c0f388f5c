"""What was edited, when, and what became of it: the rows that ``editlab log`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlab.errors import UserError
from editlab.runs.delta import FILE, Delta
from editlab.runs.event_log import EventLog
from editlab.runs.history import Edit, History, Removed, fates, utc
from editlab.runs.outcomes import FILE as OUTCOMES
from editlab.runs.outcomes import read_outcomes
from editlab.runs.patched_model import PATCH, read_patch
from editlab.runs.tables import Table

EDITS = "edits.json"
"""File in an exported model's folder that holds the history of its edits."""


@dataclass(frozen=True)
class EditLog:
    """The edits of one run, patch or exported model."""

    path: Path
    base: str
    """name of the base model; empty if it is not known"""
    when: str
    """time at which its run was finished, in UTC; empty if it is not known"""
    edits: Sequence[Edit]
    removals: Sequence[Removed] = ()
    reasons: Mapping[int, str] | None = None
    """batch, from 1 -> why a callback scaled it, rolled it back or dropped facts from it"""

    def to_dict(self) -> dict[str, Any]:
        """The log as plain data, for JSON."""
        return {
            "path": str(self.path), "base": self.base, "when": self.when,
            "edits": [row | {"number": n} for n, row in enumerate(map(self._plain, self.edits), start=1)],
            "removals": [{"when": r.when, "edits": list(r.edits), **r.measured} for r in self.removals],
        }  # fmt: skip

    def _plain(self, edit: Edit) -> dict[str, Any]:
        return {
            "subject": edit.subject, "prompt": edit.prompt, "target_new": edit.target_new,
            "target_true": edit.target_true, "batch": edit.batch, "fate": edit.fate, "reason": self._reason(edit),
        }  # fmt: skip

    def _reason(self, edit: Edit) -> str:
        found = (self.reasons or {}).get(edit.batch, "")
        return found if edit.fate == "rolled back" or edit.fate.startswith("scaled") else ""

    def to_text(self) -> str:
        """A heading, a table with a row for each edit, and a line for each removal."""
        times = {n: one.when for one in self.removals for n in one.edits}
        rows = [
            [str(n), f"{edit.subject}|{edit.prompt}", edit.target_new, str(edit.batch),
             times.get(n, self.when), edit.fate, self._reason(edit)]
            for n, edit in enumerate(self.edits, start=1)
        ]  # fmt: skip
        shown = [[_one_line(cell) for cell in row] for row in rows]
        header = ["", "fact", "new target", "batch", "when", "fate", "why"]
        if not any(row[-1] for row in shown):
            header, shown = header[:-1], [row[:-1] for row in shown]
        counted = ", ".join(f"{count} {fate}" for fate, count in fates(self.edits).items())
        title = f"{self.path}: {len(self.edits)} edits{f' of {self.base}' if self.base else ''} ({counted or 'none'})"
        table = Table(header, shown, numbers=(0, 3)).to_text() if shown else ""
        return "\n".join([title, *([table] if table else []), *map(_removal_line, self.removals)])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _removal_line(removal: Removed) -> str:
    numbers, said = ", ".join(map(str, removal.edits)), []
    measured = removal.measured
    if "original_answers" in measured:
        said.append(f"original answer back for {measured['original_answers']:.0f} of {len(removal.edits)}")
    if "accuracy_after" in measured:
        said.append(
            f"accuracy of {measured['others']:.0f} others {measured['accuracy_before']:.3f} -> "
            f"{measured['accuracy_after']:.3f}"
        )
    return f"{removal.when}  taken out: {numbers}{'; ' if said else ''}{'; '.join(said)}"


def read_log(folder: str) -> list[EditLog]:
    """The logs of a run's folder, of an exported model, of a delta, or of each of them directly in a folder.

    Raises:
        UserError: There is no such folder, nothing in it was edited, or a file is damaged.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise UserError(
            f"There is no {folder!r}: give a run's folder, a delta, an exported model, or a folder of some."
        )
    if (found := _log_of(path)) is not None:
        return [found]
    below = sorted([*path.iterdir()]) if path.is_dir() else []
    logs = [log for one in below if not one.name.startswith(".") and (log := _log_of(one)) is not None]
    if not logs:
        raise UserError(
            f"{folder} holds no edits: give a run's folder, a delta, an exported model, or a folder of some of these."
        )
    return logs


def _log_of(path: Path) -> EditLog | None:
    """The log of a path; None if nothing there was edited by editlab."""
    if path.is_file():
        ours = path.suffix == ".ckpt" or (path.suffix == ".safetensors" and Delta.is_file(path))
        return _of_delta(path, read_patch(str(path))) if ours else None
    if any((path / name).is_file() for name in (FILE, f"{PATCH}/{FILE}")):
        return _of_delta(path, read_patch(str(path)))
    if (path / EDITS).is_file():
        history = _read_history(path / EDITS)
        return EditLog(path, "", history.when, history.edits, history.removals)
    if (path / "checkpoints" / "last.ckpt").is_file():
        return _of_delta(path, Delta.from_checkpoint(path / "checkpoints" / "last.ckpt", usable=False))
    if (path / OUTCOMES).is_file():
        return _of_outcomes(path)
    return None


def _of_delta(path: Path, delta: Delta) -> EditLog:
    history = delta.history
    return EditLog(path, delta.language_model, history.when, history.edits, history.removals, _reasons(path))


def _of_outcomes(path: Path) -> EditLog:
    """The log of a run without a checkpoint."""
    edits = [
        Edit(
            row.get("subject", ""), row.get("prompt", ""), row.get("target_new", ""), row.get("target_true"),
            row["step"] + 1, f"scaled to {row['factor']:.2g}" if row["status"] == "scaled" else row["status"],
        )
        for row in read_outcomes(path / OUTCOMES)
    ]  # fmt: skip
    return EditLog(path, "", utc((path / OUTCOMES).stat().st_mtime), edits, (), _reasons(path))


def _read_history(path: Path) -> History:
    try:
        return History.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: export the model again.") from error


def _reasons(path: Path) -> dict[int, str]:
    """Batch, from 1 -> the reason in the run's event logs."""
    found: dict[int, str] = {}
    for file in sorted(path.glob("*_events.jsonl")) if path.is_dir() else ():
        for event in EventLog(file).read():
            if event.get("kind") == "batch" and isinstance(event.get("reason"), str):
                found[event["step"] + 1] = event["reason"]
    return found
