"""Tables of an experiment's runs, means over seeds with their intervals, and curves drawn from such tables.

A table outlives its runs: rows of runs that are not at hand (made on another machine, or deleted since) stay in it,
and those of runs that are take the place of earlier ones. Each row says what it was made with.
"""

from __future__ import annotations

import csv
import inspect
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch import JOINT, read_provenance
from matplotlib.figure import Figure
from sweep import Run

from callbacks import ForgettingCurve
from editlab.runs.figures import comparison_figure
from editlab.utils.files import atomic_file

Row = dict[str, Any]

VERSIONS = ("editlab", "torch", "transformers", "peft")
"""Packages whose versions a table gives."""

MADE_WITH = ("recipe", "settings", "revision", "machine", *VERSIONS)
"""Columns of every table that say what a row was made with."""

MEASURES: dict[str, Callable[[Row], float]] = {
    "accuracy": lambda row: float(row["retained_accuracy"]),
    "ES": lambda row: float(row["retained_ES"]),
    "NS": lambda row: float(row["retained_NS"]) - float(row["before_NS"]),
    "perplexity_ratio": lambda row: float(row["perplexity_ratio"]),
}
"""name -> number of a run's row; NS as the change from the unedited model"""

CURVE = {
    "retained_ES": "retained/ES",
    "retained_accuracy": "retained/accuracy",
    "retained_PS": "retained/PS",
    "retained_NS": "retained/NS",
    "immediate_accuracy": "immediate/accuracy",
    "perplexity_heldout": "perplexity/heldout",
}
"""column of a snapshot -> what the run calls it"""


# ---- rows of runs ---------------------------------------------------------------------------------------------------


def provenance_of(run: Run) -> dict[str, str]:
    """Recipe, settings, revision and machine that a run was started with, as far as noted, and its versions."""
    noted = read_provenance(run.folder) or {"revision": "", "machine": ""}
    versions = (run.summary or {}).get("versions", {})
    return {"recipe": run.recipe, **noted, **{name: versions.get(name, "") for name in VERSIONS}}


def provenance_of_all(rows: Sequence[Row]) -> dict[str, str]:
    """The same of a row that several rows went into: what differs among them stands side by side."""
    made = {name: [one for row in rows for one in row.get(name, "").split(JOINT) if one] for name in MADE_WITH}
    return {name: JOINT.join(dict.fromkeys(ways)) for name, ways in made.items() if ways}


def table_rows(runs: Sequence[Run], more: Callable[[Run], Row] | None = None) -> list[Row]:
    """One row a run: its labels and seed, the numbers of its summary, ``more``, and what it was started with."""
    rows = []
    for run in runs:
        summary = run.summary
        assert summary is not None
        row = {"case": run.case.name, **run.case.labels, "seed": run.seed, "edits": summary["edits"]}
        row |= {f"retained_{k}": round(v, 4) for k, v in _finite(summary["retained"]).items()}
        for group, names in (("immediate", ("ES", "PS", "NS", "accuracy")), ("before", ("PS", "NS"))):
            measured = _finite(summary[group])
            row |= {f"{group}_{k}": round(measured[k], 4) for k in names if k in measured}
        perplexity = _finite(summary["perplexity"])
        row |= {f"perplexity_{when}": round(value, 3) for when, value in perplexity.items()}
        if {"before", "after"} <= perplexity.keys():
            row["perplexity_ratio"] = round(perplexity["after"] / perplexity["before"], 4)
        rows.append({**row, **(more(run) if more is not None else {}), **provenance_of(run)})
    return rows


def _finite(measured: Mapping[str, float | None]) -> dict[str, float]:
    """What is a number: a summary has null where edits have broken the model so far that it gives none."""
    return {name: value for name, value in measured.items() if value is not None}


def snapshots(runs: Sequence[Run]) -> list[Row]:
    """One row a run and snapshot: what was retained, and how large norms and conditions had become.

    Shares of edits stand with the number of edits that they were measured on and their 95% interval; ``largest_update``
    is the norm of the largest single update since the snapshot before.
    """
    rows = []
    for run in runs:
        steps = run.curve()
        curve = {edits: point for edits, point in steps.items() if "retained/accuracy" in point}
        earlier = 0
        for edits, point in curve.items():
            row: Row = {"case": run.case.name, "seed": run.seed, "edits": edits}
            row |= {column: round(point[name], 4) for column, name in CURVE.items() if name in point}
            row["measured"] = _standing(run) if edits == max(curve) else min(edits, _sample(run))
            for name in ("retained_ES", "retained_accuracy"):
                if name in row:
                    low, high = wilson(row[name], row["measured"])
                    row |= {f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
            row |= {
                "delta_norm": _largest([point], "delta_norm"),
                "gram_condition": _largest([point], "gram_condition"),
            }
            row["largest_update"] = _largest([p for at, p in steps.items() if earlier < at <= edits], "update_norm")
            earlier = edits
            rows.append(row | provenance_of(run))
    return rows


def _standing(run: Run) -> int:
    """Edits that are asked for at the end: those that were neither rolled back nor superseded."""
    summary = run.summary or {}
    return int(summary["edits"]) - int(summary.get("superseded", 0))


def _sample(run: Run) -> int:
    """Past edits that a point of the run's curve is measured on."""
    given = [c.get("init_args", {}) for c in run.case.callbacks if c["class_path"].endswith("ForgettingCurve")]
    default = inspect.signature(ForgettingCurve).parameters["sample"].default
    return int(given[0].get("sample", default) if given else default)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share that was observed on ``count`` cases (Wilson 1927's score interval)."""
    z = 1.95996
    middle, half = share + z**2 / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return (middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)


def _largest(points: Sequence[Mapping[str, float]], name: str) -> float | str:
    """The largest over layers of what steps logged; empty where they logged none."""
    found = [value for point in points for key, value in point.items() if key.endswith(f"/{name}")]
    return float(f"{max(found):.4g}") if found else ""


# ---- means over seeds -----------------------------------------------------------------------------------------------

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5% quantiles of Student's t by a few degrees of freedom"""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% t-interval of a few independent values; the interval is NaN for one, or where one is not finite."""
    mean = statistics.mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    half = t_975(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def t_975(freedom: int) -> float:
    """97.5% quantile of Student's t.

    From ten degrees of freedom on by the normal quantile's expansion (Abramowitz and Stegun 1964, 26.7.5), to 1e-4.
    """
    if freedom in T_975:
        return T_975[freedom]
    z, n = 1.959964, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def against(rows: Sequence[Row], base: str, measure: Callable[[Row], float]) -> dict[str, tuple[float, float, float]]:
    """For each case the difference of a measure to the case ``base``, paired by seed: mean and 95% t-interval."""
    of: dict[str, dict[int, float]] = {}
    for row in rows:
        of.setdefault(row["case"], {})[int(row["seed"])] = measure(row)
    return {
        case: interval([value - of[base][seed] for seed, value in values.items() if seed in of[base]])
        for case, values in of.items()
        if base in of and set(values) & set(of[base])
    }


def means(rows: Sequence[Row], base: Mapping[str, str], otherwise: str, cases: Collection[str] = ()) -> list[Row]:
    """One row a case: means over seeds, and what it gains over its base, paired by seed, all with 95% t-intervals.

    Args:
        rows: of :func:`table_rows`.
        base: case -> the case that it is held against.
        otherwise: the base of cases not named.
        cases: names of all cases of the experiment, in their order; those without a row stand there with 0 seeds.
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
            one |= _named(name, interval([measure(row) for row in own]))
        one["against"] = base.get(case, otherwise)
        for name, measure in measured.items():
            some = [row for row in rows if _has(measure, row)]
            gain = against(some, one["against"], measure).get(case, (math.nan,) * 3)
            one |= _named(f"{name}_gain", gain)
        found.append({**one, **provenance_of_all(own)})
    return found


def _named(name: str, found: tuple[float, float, float]) -> Row:
    """A mean and the ends of its interval, in columns of their own."""
    return {f"{name}{end}": round(x, 4) for end, x in zip(("", "_low", "_high"), found, strict=True)}


def _has(measure: Callable[[Row], float], row: Row) -> bool:
    """Whether a run was measured so: facts may have no neighbors, and a run no held-out text."""
    try:
        measure(row)
    except KeyError:
        return False
    return True


# ---- files ----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, all values as they are written; a column that is empty in a row is absent from it."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as a CSV file, what they were made with in the last columns; a column that a row lacks is empty there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = dict.fromkeys(name for row in rows for name in row)
    columns = [*(n for n in named if n not in MADE_WITH), *(n for n in MADE_WITH if n in named)]
    with atomic_file(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def update_table(path: Path, rows: Sequence[Row], cases: Collection[str]) -> list[Row]:
    """Writes rows into a table in which those of other runs stay.

    Args:
        path: of the table, whether it is there or not.
        rows: of the runs at hand, each with its ``case`` and ``seed``.
        cases: names of all cases of the experiment, in their order; rows of others are dropped.

    Returns:
        All rows of the table, by case and seed.
    """
    made = {(row["case"], int(row["seed"])) for row in rows}
    earlier = read_rows(path) if path.exists() else []
    stay = [row for row in earlier if row["case"] in cases and (row["case"], int(row["seed"])) not in made]
    places = {case: place for place, case in enumerate(cases)}
    found = sorted([*stay, *rows], key=lambda row: (places[row["case"]], int(row["seed"]), int(row.get("edits", 0))))
    write_rows(found, path)
    return found


def curves_figure(rows: Sequence[Row], shown: Sequence[Mapping[str, tuple[str, str, str]]]) -> Figure | None:
    """Retained ES, accuracy, NS and perplexity over edits; bands are the range over seeds.

    Args:
        rows: of :func:`snapshots`.
        shown: of each row of panels: case -> label, color, line.

    Returns:
        None where no row is of a case that is shown.
    """
    curves: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for row in rows:
        point = {name: float(row[column]) for column, name in CURVE.items() if column in row}
        curves.setdefault(row["case"], {}).setdefault(int(row["seed"]), {})[int(row["edits"])] = point
    drawn = [
        {
            label: (list(curves[case].values()), color, line)
            for case, (label, color, line) in row.items()
            if case in curves
        }
        for row in shown
    ]
    return comparison_figure(*filter(None, drawn)) if any(drawn) else None
