"""What the page shows of one run: points of its curves, outcomes of its facts, and decisions of its callbacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from editlab.edits.ledger import Ledger
from editlab.errors import UserError
from editlab.evaluation.generation import Generated
from editlab.evaluation.scoring import FactScores
from editlab.metrics import PromptScores
from editlab.metrics.names import BEFORE, IMMEDIATE, PERPLEXITY, RETAINED, TABLE_GROUPS, full_name
from editlab.runs.checkpoint import LAST, read_checkpoint
from editlab.runs.event_log import EventLog
from editlab.runs.figures import PANELS, Series, one_perplexity, perplexity_of_curve
from editlab.runs.folders import RunFolder
from editlab.runs.frames import EVENTS
from editlab.runs.outcome_table import is_held, prompt_of, worst_first
from editlab.runs.outcomes import answers_of, outcome_rows
from editlab.runs.resume import KEY
from editlab.runs.tables import Table

# ---- curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One panel of the curves."""

    title: str
    points: tuple[tuple[int, str, float], ...]
    """(number of edits, group, value)"""
    fraction: bool = True
    """whether the values lie between 0 and 1"""


def panels(curve: Series, metrics: Mapping[str, Any]) -> list[Panel]:
    """The panels of a run's curves; a metric that was not measured has none.

    Args:
        curve: the run's table of metrics.
        metrics: those of its summary; {} if it has not finished.
    """
    curve = one_perplexity(curve)
    found = [Panel(title, _points(curve, name, TABLE_GROUPS)) for name, title in PANELS]
    edited = _points(curve, PERPLEXITY, (RETAINED,))
    unedited = perplexity_of_curve(metrics, BEFORE)
    if edited and unedited is not None:
        edited += tuple((edits, BEFORE, float(unedited)) for edits in sorted({0, edited[-1][0]}))
    return [panel for panel in (*found, Panel("held-out perplexity", edited, False)) if panel.points]


def _points(curve: Series, name: str, groups: Iterable[str]) -> tuple[tuple[int, str, float], ...]:
    return tuple(
        (edits, group, row[full_name(group, name)])
        for group in groups
        for edits, row in sorted(curve.items())
        if full_name(group, name) in row
    )


# ---- facts ----------------------------------------------------------------------------------------------------------

ALL, LOST, FORGOTTEN, NEVER, UNDONE = "all", "not held", "forgotten", "never learnt", "not in the weights"
KINDS = (ALL, LOST, FORGOTTEN, NEVER, UNDONE)
"""Kinds of facts that can be chosen: :func:`chosen`."""


def outcomes_of(folder: Path, running: bool = False) -> list[Mapping[str, Any]]:
    """The outcome of each fact of a run that has gone through a step, the worst first.

    A finished run has them in its ``outcomes.csv``. For one that is running or was killed, they are made from its last
    checkpoint, which has the values before and right after each edit.

    Args:
        folder: the run's folder.
        running: whether the run goes on; the outcomes in its folder may then be those before it was resumed.

    Raises:
        UserError: The file, or the checkpoint, is damaged.
    """
    run = RunFolder(folder)
    checkpoint = folder / "checkpoints" / f"{LAST}.ckpt"
    if checkpoint.is_file() and (running or not run.has_outcomes):
        return _rows_in(checkpoint, checkpoint.stat().st_mtime_ns)
    return worst_first(run.outcomes) if run.has_outcomes else []


@lru_cache(maxsize=2)
def _rows_in(checkpoint: Path, written: int) -> list[Mapping[str, Any]]:
    saved = read_checkpoint(checkpoint, verify=False)[KEY]  # scores alone: sums of updates are verified when used
    try:
        measured = saved["evaluation"]
        scores = {
            group: FactScores(**{name: PromptScores(**columns) for name, columns in some.items()}) if some else None
            for group, some in measured["scores"].items()
        }
        answers = {BEFORE: [Generated(**one) for one in measured.get("generated_before", [])]}
        return worst_first(outcome_rows(Ledger.of(saved), scores, answers_of(answers)))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"The outcomes in {checkpoint} were written by another version of editlab: finish the run, or view it with "
            "that version."
        ) from error


def chosen(rows: Iterable[Mapping[str, Any]], kind: str = ALL, words: str = "") -> list[Mapping[str, Any]]:
    """The rows of one kind of :data:`KINDS` in whose texts all of the words are, in upper or lower case."""
    wanted = words.casefold().split()
    return [row for row in rows if _is(row, kind) and all(word in _texts(row) for word in wanted)]


def _is(row: Mapping[str, Any], kind: str) -> bool:
    learnt, held = row.get(full_name(IMMEDIATE, "hit")), is_held(row)
    return {
        ALL: True,
        LOST: held is False,
        FORGOTTEN: held is False and learnt == 1,
        NEVER: not held and learnt == 0,
        UNDONE: row["status"] not in ("kept", "scaled"),
    }[kind]


def _texts(row: Mapping[str, Any]) -> str:
    """The prompt, the targets and the answers of a row, in lower case."""
    answers = [row.get(full_name(group, "generated"), "") for group in (BEFORE, RETAINED)]
    return "\n".join([prompt_of(row), row["target_new"], row.get("target_true", ""), *answers]).casefold()


# ---- decisions ------------------------------------------------------------------------------------------------------

DECISIONS = {
    "keep": "accepted", "scale": "scaled", "firm": "held back", "rollback": "rolled back", "drop": "left out",
    "leave_out": "left out",
}  # fmt: skip
"""Decision in an event log -> the word for it on the page."""

MOST_EVENTS = 200
"""Largest number of events in a table."""


@dataclass(frozen=True)
class Decisions:
    """The decisions of one callback."""

    title: str
    """name of its event log, such as ``trust``"""
    counts: str
    """how many there are of each kind"""
    table: Table
    """the last :data:`MOST_EVENTS` of them, the newest first"""


def decisions_in(folder: Path, all_events: bool = True) -> list[Decisions]:
    """The decisions in each event log of a run; a line that is being written is left out.

    Args:
        folder: the run's folder.
        all_events: whether the tables have the accepted ones, too.
    """
    found = []
    for file in sorted(folder.glob(EVENTS)):
        events = [event for event in EventLog(file).read() if "decision" in event]
        if events:
            counts = Counter(map(_decision, events))
            shown = [event for event in events if all_events or event["decision"] != "keep"]
            rows = [_event(event) for event in shown[: -MOST_EVENTS - 1 : -1]]
            table = Table(["batch", "decision", "score", "threshold", "reason"], rows, (0, 2, 3)).without_empty()
            text = ", ".join(f"{count} {word}" for word, count in counts.most_common())
            found.append(Decisions(file.stem.removesuffix("_events"), text, table))
    return found


def _decision(event: Mapping[str, Any]) -> str:
    word = str(event["decision"])
    return DECISIONS.get(word, word) + (" (fact)" if isinstance(event.get("fact"), Mapping) else "")


def _event(event: Mapping[str, Any]) -> Sequence[str]:
    numbers = (event.get(name) for name in ("score", "threshold"))
    shown = [f"{number:.2f}" if isinstance(number, int | float) else "" for number in numbers]
    fact = event.get("fact")
    about = f"{fact.get('subject')}: {fact.get('target_new')}" if isinstance(fact, Mapping) else ""
    reason = "; ".join(filter(None, (about, str(event.get("reason") or ""))))
    factor = event.get("factor")
    scaled = f" to {factor:.2g}" if event["decision"] == "scale" and isinstance(factor, int | float) else ""
    return [str(event["step"] + 1), _decision(event) + scaled, *shown, reason]
