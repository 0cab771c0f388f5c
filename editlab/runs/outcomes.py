"""The outcome of each edit of a run, as ``outcomes.csv`` in its folder: one row for each fact that went through a step.

Columns of every row:

========================  ==========================================================================================
column                    content
========================  ==========================================================================================
``edit``                  number of the edit, from 1
``id``                    the fact's identifier in its file, as text
``subject``               the fact's subject
``prompt``                its edit prompt, a template with ``{}`` for the subject
``target_new``            the new target
``target_true``           the true target; empty if the fact names none
``step``                  number of its batch, from 0, as in the event logs
``status``                ``kept``, ``scaled``, ``rolled back``, ``superseded``; of independent batches ``taken out``
``factor``                fraction of its edit that stayed
========================  ==========================================================================================

Columns of each group (``before/hit``, ``immediate/hit``, ``retained/hit``), empty where nothing was measured:

========================  ==========================================================================================
column                    content
========================  ==========================================================================================
``logp_new``              mean log-probability per token of the new target after the edit prompt, in nats
``logp_true``             the same of the true target
``hit``                   1 if the argmax is right at every token of the new target, else 0
``paraphrase_hits``       number of paraphrases of which the same holds
``paraphrase_preferred``  number of paraphrases on which the new target is likelier than the true one
``paraphrases``           number of paraphrases that were measured
``neighbor_hits``         number of neighbor prompts on which the argmax is right at every token of their own truth
``neighbor_preferred``    number of neighbor prompts on which that truth is likelier than the new target
``neighbors``             number of neighbor prompts that were measured
``generated``             the model's own continuation of the edit prompt
``contains``, ``exact``   1 if that answer contains the target, or is the target; else 0
``f1``                    token F1 of that answer
``judged``                1 if a judge says that the answer states the target, else 0
========================  ==========================================================================================

A fact that was rolled back or superseded is not in the weights, so it has no ``retained/...`` values.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from editlab.errors import UserError
from editlab.metrics.functional.editing import prompt_values
from editlab.metrics.names import EDIT, RETAINED, TABLE_GROUPS, full_name
from editlab.utils.csv_cells import defused, restored
from editlab.utils.files import atomic_file

if TYPE_CHECKING:  # tables and reports read outcomes without a model, and start faster without these
    from editlab.edits.ledger import Ledger
    from editlab.evaluation.generation import Generated
    from editlab.evaluation.scoring import FactScores
    from editlab.metrics.scores import PromptScores

FILE = "outcomes.csv"

ROLLED_BACK, TAKEN_OUT = "rolled back", "taken out"
"""Statuses of edits that are not in the weights at the end of their batch, or of the next one."""

FACT = ("edit", "id", "subject", "prompt", "target_new", "target_true", "step", "status", "factor")
"""Columns that every row has."""

SCORED = (
    "logp_new", "logp_true", "hit", "paraphrase_hits", "paraphrase_preferred", "paraphrases", "neighbor_hits",
    "neighbor_preferred", "neighbors",
)  # fmt: skip
"""Columns of a group that its scores give."""

ANSWERED = ("generated", "contains", "exact", "f1", "judged")
"""Columns of a group that generated answers give."""

Row: TypeAlias = dict[str, Any]
"""column -> value; a column whose cell is empty is absent"""

Answers: TypeAlias = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""group -> number of the fact in the group -> columns of :data:`ANSWERED`"""

_SINGLE = {"logp_new", "logp_true"}
"""Columns of float32."""
_FLOATS = {"factor", "f1"}
_TEXTS = {"id", "subject", "prompt", "target_new", "target_true", "status", "generated"}
_REQUIRED = {"edit", "step", "status", "factor"}


def outcome_rows(ledger: Ledger, scores: Mapping[str, FactScores | None], answers: Answers | None = None) -> list[Row]:
    """One row for each edit, in the order of the edits.

    Args:
        ledger: the run's edits.
        scores: group -> its scores. In ``before`` and ``immediate`` fact number i is the ledger's entry i; in
            ``retained`` it is the i-th standing fact.
        answers: what the model generated, with the facts numbered in the same way; None if nothing was generated.
            Answers about facts that were not edited, as in a run that was stopped early, are left out.

    Raises:
        ValueError: if a group of answers has a column that is not one of :data:`ANSWERED`.
    """
    answers = answers or {}
    rows: list[Row] = []
    for number, (entry, fate) in enumerate(zip(ledger, ledger.fates, strict=True), start=1):
        fact = entry.fact
        row: Row = {
            "edit": number, "id": str(fact.id), "subject": fact.subject, "prompt": fact.prompt,
            "target_new": fact.target_new, "target_true": fact.target_true, "step": entry.batch,
            "status": _status(fate), "factor": float(entry.factor),
        }  # fmt: skip
        rows.append({name: value for name, value in row.items() if value is not None})
    for group in TABLE_GROUPS:
        numbers = ledger.standing_numbers if group == RETAINED else range(len(rows))
        for found in (_scored(scores.get(group)), answers.get(group, {})):
            for i, columns in found.items():
                if i >= len(numbers):  # of a fact that a stopped run has not edited
                    continue
                if unknown := columns.keys() - {*SCORED, *ANSWERED}:
                    raise ValueError(f"{sorted(unknown)} are no columns of {FILE}: there are {', '.join(ANSWERED)}.")
                rows[numbers[i]] |= {full_name(group, name): columns[name] for name in columns}
    return rows


def answers_of(generated: Mapping[str, Sequence[Generated]]) -> Answers:
    """The free answers to edit prompts as columns; ``judged`` only where a judge gave a verdict.

    Args:
        generated: group -> answers to all kinds of prompts (:attr:`editlab.evaluation.evaluator.Evaluation.generated`).
    """
    return {
        group: {
            one.index: {"generated": one.text, "contains": one.contains, "exact": one.exact, "f1": one.f1}
            | ({} if one.judged is None else {"judged": one.judged})
            for one in answers
            if one.kind == EDIT
        }
        for group, answers in generated.items()
    }


def _status(fate: str) -> str:
    """The kind of a fate of :attr:`~editlab.edits.ledger.Ledger.fates`.

    >>> [_status(fate) for fate in ("kept", "superseded by edit 7", "scaled to 0.5", "rolled back")]
    ['kept', 'superseded', 'scaled', 'rolled back']
    """
    words = fate.split()
    return words[0] if words[0] in ("kept", "superseded", "scaled") else " ".join(words[:2])


def _scored(scores: FactScores | None) -> dict[int, Row]:
    """Number of the fact -> its columns of :data:`SCORED`."""
    if scores is None:
        return {}
    edit = scores.edit.to("cpu")
    found: dict[int, Row] = {}
    for i, new, true, hit in zip(
        edit.record.tolist(), edit.logp_new.tolist(), edit.logp_true.tolist(), edit.hit_new.tolist(), strict=True
    ):
        found[i] = {"logp_new": new, "hit": int(hit)} | ({} if math.isnan(true) else {"logp_true": true})
    for name, prompts, prefer_truth in (
        ("paraphrase", scores.paraphrases, False),
        ("neighbor", scores.neighbors, True),
    ):
        if prompts is not None:
            for i, columns in _counted(name, prompts.to("cpu"), prefer_truth).items():
                found.setdefault(i, {}).update(columns)
    return found


def _counted(name: str, prompts: PromptScores, prefer_truth: bool) -> dict[int, Row]:
    """Number of the fact -> how many of its prompts were measured, hit, and preferred (if they can be judged)."""
    kinds = {f"{name}_hits": "accuracy", f"{name}_preferred": "score"}
    values = {
        column: prompt_values(prompts, kind, prefer_truth=prefer_truth).tolist() for column, kind in kinds.items()
    }
    found: dict[int, Row] = {}
    for index, i in enumerate(prompts.record.tolist()):
        own = found.setdefault(i, {f"{name}s": 0})
        own[f"{name}s"] += 1
        for column, each in values.items():
            if not math.isnan(each[index]):
                own[column] = own.get(column, 0) + int(each[index])
    return found


def write_outcomes(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as a CSV file; columns of a group that no row has are left out.

    Log-probabilities are written with as many digits as float32 needs to be read back to the same bits. Texts that a
    spreadsheet would evaluate get an apostrophe in front (:mod:`editlab.utils.csv_cells`).
    """
    named = [full_name(group, name) for group in TABLE_GROUPS for name in (*SCORED, *ANSWERED)]
    columns = [*FACT, *(name for name in named if any(name in row for row in rows))]
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: defused(_shown(name, value)) for name, value in row.items()} for row in rows)


def _shown(column: str, value: Any) -> Any:
    name = column.rpartition("/")[2]
    if name in _SINGLE:
        return str(np.float32(value))
    return value if name in _TEXTS or name in _FLOATS else int(value)


def read_outcomes(path: Path) -> list[Row]:
    """Rows of a run's ``outcomes.csv``, in the order of the edits.

    Raises:
        UserError: if there is no such file, or it is damaged or was written by another program.
    """
    if not path.is_file():
        raise UserError(
            f"There is no {path}: the run has not finished, or is of an older version of editlab; finish it with "
            "--ckpt_path last, or let editlab validate measure its checkpoint."
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [{name: _parsed(name, cell) for name, cell in row.items() if cell} for row in reader]
            if not {*FACT} <= {*(reader.fieldnames or ())} or not all(row.keys() >= _REQUIRED for row in rows):
                raise KeyError
        return rows
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:  # a column or a cell is wrong
        raise UserError(f"{path} is damaged or not one of editlab's: leave the run out, or run it again.") from error


def _parsed(column: str, cell: str) -> Any:
    name = column.rpartition("/")[2]
    if name in _TEXTS:
        return restored(cell)
    if name in _SINGLE:
        return float(np.float32(cell))
    return float(cell) if name in _FLOATS else int(cell)


# ---- one number for each fact --------------------------------------------------------------------------------------


def _ratio(part: str, whole: str) -> Callable[[Row, str], float]:
    return lambda row, group: row[full_name(group, part)] / row[full_name(group, whole)]


def _column(name: str) -> Callable[[Row, str], float]:
    return lambda row, group: float(row[full_name(group, name)])


MEASURES: Mapping[str, Callable[[Row, str], float]] = {
    "ES": lambda row, group: float(row[full_name(group, "logp_new")] > row[full_name(group, "logp_true")]),
    "accuracy": _column("hit"),
    "PS": _ratio("paraphrase_preferred", "paraphrases"),
    "paraphrase_accuracy": _ratio("paraphrase_hits", "paraphrases"),
    "NS": _ratio("neighbor_preferred", "neighbors"),
    "neighbor_accuracy": _ratio("neighbor_hits", "neighbors"),
    "generation": _column("contains"),
    "generation_exact": _column("exact"),
    "generation_f1": _column("f1"),
    "judged": _column("judged"),
}
"""metric -> its value for one fact, from a row and a group; the metric is the mean of these over the facts"""


def outcome_values(rows: Sequence[Row], metric: str, group: str = RETAINED) -> dict[tuple[str, ...], float]:
    """The value of a metric for each fact that has one.

    Args:
        rows: of :func:`outcome_rows` or :func:`read_outcomes`.
        metric: a name in :data:`MEASURES`.
        group: ``before``, ``immediate`` or ``retained``.

    Returns:
        The fact (its id, subject, prompt and new target) -> value. If a run has edited the same fact several times,
        its last value counts.
    """
    found: dict[tuple[str, ...], float] = {}
    for row in rows:
        try:
            value = MEASURES[metric](row, group)
        except KeyError:  # not measured
            continue
        found[row["id"], row["subject"], row["prompt"], row["target_new"]] = value
    return found
