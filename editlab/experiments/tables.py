"""Rows of tables: of runs, of snapshots on the way, and means over seeds.

Metrics have the names of the log and of ``summary.json``: ``retained/ES``, ``immediate/accuracy``,
``before/perplexity``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from editlab.experiments.csv_files import MADE_WITH, VERSIONS, Row
from editlab.experiments.plan import Run
from editlab.experiments.provenance import NONE, RECIPE_CONTENT, joined, read_provenance
from editlab.experiments.statistics import Interval, paired_differences, t_interval, wilson
from editlab.runs.figures import one_perplexity
from editlab.runs.folders import RunFolder
from editlab.runs.outcomes import ROLLED_BACK, TAKEN_OUT

SNAPSHOT = ("retained/ES", "retained/accuracy", "retained/generation", "retained/PS", "retained/paraphrase_accuracy",
            "retained/NS", "retained/neighbor_accuracy", "cohort/ES", "cohort/accuracy", "immediate/accuracy",
            "retained/perplexity")  # fmt: skip
"""Metrics of a snapshot; the perplexity is of the same tokens in each of them (:func:`one_perplexity`)."""

_SHOWN = {
    "immediate": ("ES", "PS", "NS", "accuracy"),
    "before": ("PS", "NS", "neighbor_accuracy", "neighbor_generation", "bystander_accuracy", "bystander_generation"),
}
"""Metrics of a run's row by group, apart from perplexities; of ``retained`` all but those by age."""


def _retained(row: Mapping[str, Any], name: str) -> float:
    return float(row[f"retained/{name}"])


def _change(row: Mapping[str, Any], name: str) -> float:
    return float(row[f"retained/{name}"]) - float(row[f"before/{name}"])


_SELECTION = {"keep": "keep", "split": "split", "checked": "facts_checked", "preferred": "facts_preferred",
              "known": "facts_known", "neighbors_left_out": "neighbors_left_out"}  # fmt: skip
"""How a run's facts were selected: entry of ``facts`` in ``summary.json`` -> column."""

MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "retained/accuracy": lambda row: float(row["retained/accuracy"]),
    "retained/ES": lambda row: float(row["retained/ES"]),
    **{
        f"retained/{name}": partial(_retained, name=name)
        for name in ("generation", "PS", "paraphrase_accuracy", "neighbor_accuracy")
    },
    **{f"{name}_change": partial(_change, name=name) for name in ("NS", "bystander_accuracy", "bystander_generation")},
    "perplexity_ratio": lambda row: float(row["perplexity_ratio"]),
}
"""column of a table of means -> number of a run's row; NS and bystanders as the change from the unedited model"""


# ---- rows of runs ---------------------------------------------------------------------------------------------------


def provenance_of(run: Run) -> dict[str, str]:
    """Recipe, settings, revision and machine that a run was started with, and its versions.

    What was not recorded, as of a run that no sweep has started, is absent; no table takes such a run.
    """
    noted = read_provenance(run.folder)
    if noted.get("revision") == "":  # as earlier versions of editlab wrote it for a folder in no git repository
        noted["revision"] = NONE
    noted.pop(RECIPE_CONTENT, None)  # tells a sweep whether a run is still valid; no column of tables
    versions = (run.summary or {}).get("versions", {})
    return {"recipe": run.recipe, **noted, **{name: versions.get(name, "") for name in VERSIONS}}


def provenance_of_all(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Provenance of a row that is made of several: each value once."""
    return joined(rows, MADE_WITH)


def rows_of_runs(runs: Sequence[Run], columns: Sequence[str] = ()) -> list[Row]:
    """One row for each finished run: labels, seed, metrics, further columns, and what it was made with.

    Args:
        runs: finished ones.
        columns: names in :data:`COLUMNS`.
    """
    rows = []
    for run in runs:
        summary, metrics = run.summary or {}, run.metrics
        row: Row = {"case": run.case.name, **run.case.labels, "seed": run.seed, "edits": summary["edits"]}
        retained = [
            n for n in metrics if n.startswith("retained/") and n not in _perplexities(metrics) and "_age_" not in n
        ]
        others = [f"{group}/{name}" for group, names in _SHOWN.items() for name in names]
        row |= {name: round(metrics[name], 4) for name in (*retained, *others) if name in metrics}
        perplexity = {name: metrics[name] for name in _perplexities(metrics)}
        row |= {name: round(value, 3) for name, value in perplexity.items()}
        if {"before/perplexity", "retained/perplexity"} <= perplexity.keys():
            row["perplexity_ratio"] = round(perplexity["retained/perplexity"] / perplexity["before/perplexity"], 4)
        selection = summary.get("facts", {})
        row |= {column: selection[name] for name, column in _SELECTION.items() if name in selection}
        rows.append({**row, **{name: COLUMNS[name](run) for name in columns}, **provenance_of(run)})
    return rows


def _perplexities(metrics: Mapping[str, float]) -> list[str]:
    """Names of the perplexities of all texts, with their intervals, before and at the end."""
    return [name for name in metrics if name.startswith(("before/perplexity", "retained/perplexity"))]


def _effective_weight(run: Run) -> float | str:
    weights = [v for row in run.curve.values() for k, v in row.items() if k.endswith("/effective_weight")]
    return round(weights[-1], 4) if weights else ""


def _delta_norm(run: Run) -> float | str:
    norms = list((run.summary or {})["delta_norm"].values())
    return round(max(norms), 4) if norms and None not in norms else ""


def _seconds_an_edit(run: Run) -> float:
    summary = run.summary or {}
    return round(summary["seconds"] / max(1, summary["edits"]), 3)


COLUMNS: dict[str, Callable[[Run], float | str]] = {
    "effective_weight": _effective_weight,
    "delta_norm": _delta_norm,
    "seconds_an_edit": _seconds_an_edit,
    "peak_memory_mb": lambda run: round((run.summary or {})["peak_memory_mb"]),
    "seconds": lambda run: round((run.summary or {})["seconds"], 1),
}
"""further columns of a table of runs: the last step's effective weight, the largest relative norm of a layer's update,
the run's time, and its memory"""


def rows_of_snapshots(runs: Sequence[Run]) -> list[Row]:
    """One row for each snapshot of each run: what was retained, and the norms and conditions of the updates.

    Fractions of edits come with ``measured``, the number of edits that they were measured on, and their 95% interval;
    ``largest_update`` is the norm of the largest single update since the snapshot before.
    """
    rows = []
    for run in runs:
        steps = one_perplexity(run.curve)
        curve = {edits: point for edits, point in steps.items() if "retained/accuracy" in point}
        earlier = 0
        for edits, point in curve.items():
            row: Row = {"case": run.case.name, "seed": run.seed, "edits": edits}
            row |= {name: round(point[name], 4) for name in SNAPSHOT if name in point}
            row |= _with_intervals(row, _measured(run, edits, last=edits == max(curve)))
            row |= {name: _largest([point], name) for name in ("delta_norm", "gram_condition")}
            row["largest_update"] = _largest([p for at, p in steps.items() if earlier < at <= edits], "update_norm")
            earlier = edits
            rows.append(row | provenance_of(run))
    return rows


def _with_intervals(row: Row, measured: int | None) -> Row:
    """Number of edits that a snapshot's fractions were measured on, and their intervals."""
    found: Row = {} if measured is None else {"measured": measured}
    for name in ("retained/ES", "retained/accuracy"):
        if measured and name in row:
            low, high = wilson(row[name], measured)
            found |= {f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    return found


def _measured(run: Run, edits: int, last: bool) -> int | None:
    """Edits that a snapshot is measured on: all standing ones at the end, a sample before; None if not known."""
    summary = run.summary or {}
    standing = int(summary["edits"]) - int(summary.get("superseded", 0)) if last else edits
    if (folder := RunFolder(run.folder)).has_outcomes:
        made = [row for row in folder.outcomes if row["edit"] <= edits and row["status"] != ROLLED_BACK]
        batches = [row for row in made if row["status"] != TAKEN_OUT or row["step"] == made[-1]["step"]]
        standing = len({(row["subject"], row["prompt"]) for row in batches})  # an edit made anew counts once
    if last:
        return standing
    sample = _sample(run)
    return None if sample is None else min(standing, sample)


def _sample(run: Run) -> int | None:
    """Past edits of each point of a run's forgetting curve: of the case, or of the recipe that the run has saved."""
    callbacks: list[Mapping[str, Any]] = list(run.case.callbacks)
    config = run.folder / "config.yaml"
    if config.exists():
        saved = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        callbacks += (saved.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks:
        sample = callback.get("init_args", {}).get("sample")
        if str(callback["class_path"]).endswith("ForgettingCurve") and sample is not None:
            return int(sample)
    return None


def _largest(points: Sequence[Mapping[str, float]], name: str) -> float | str:
    """The largest value over layers and steps; empty if none was logged."""
    found = [value for point in points for key, value in point.items() if key.endswith(f"/{name}")]
    return float(f"{max(found):.4g}") if found else ""


# ---- means over seeds -----------------------------------------------------------------------------------------------


def rows_of_means(
    rows: Sequence[Row], base: Mapping[str, str], otherwise: str, cases: Collection[str] = ()
) -> list[Row]:
    """One row for each case: means over seeds, and differences from its base, paired by seed, with 95% t-intervals.

    Args:
        rows: of :func:`rows_of_runs`.
        base: case -> the case that it is compared with.
        otherwise: the base of all other cases.
        cases: names of all cases of the experiment, in their order; those without rows are listed with 0 seeds.
    """
    found = []
    for case in dict.fromkeys([*cases, *(row["case"] for row in rows)]):
        own = [row for row in rows if row["case"] == case]
        one: Row = {"case": case, "seeds": len(own)}
        if not own:
            found.append(one)
            continue
        measured = {name: measure for name, measure in MEASURES.items() if all(map(partial(_has, measure), own))}
        for name, measure in measured.items():
            one |= _in_columns(name, t_interval([measure(row) for row in own]))
        one["against"] = base.get(case, otherwise)
        for name, measure in measured.items():
            comparable = [row for row in rows if _has(measure, row)]
            gain = paired_differences(comparable, one["against"], measure).get(case, (math.nan,) * 3)
            one |= _in_columns(f"{name}_gain", gain)
        found.append({**one, **provenance_of_all(own)})
    return found


def _in_columns(name: str, interval: Interval) -> Row:
    return {f"{name}{end}": round(x, 4) for end, x in zip(("", "_low", "_high"), interval, strict=True)}


def _has(measure: Callable[[Mapping[str, Any]], float], row: Mapping[str, Any]) -> bool:
    """Whether a run has a measure: facts may have no neighbors, and a run no held-out text."""
    try:
        measure(row)
    except KeyError:
        return False
    return True
