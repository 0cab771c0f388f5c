"""The calibration of ``editlab plan``: forecasts of runs that were measured, and the laws fitted on both.

Rows come from tables of runs and of snapshots that ``editlab sweep`` wrote. A row's settings are those of its case in
the experiment's file. It is used if a dry solve describes its run: MEMIT with bare keys, one pass, MEMIT's spread,
values of the original weights by the default search, and no callback that edits but a consolidated memory. Forecasts
are made on the first facts of the file in the run's order, whether or not the model prefers their truths, as a key does
not depend on the truth; all seeds of a case share one forecast, and their measured numbers are averaged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import least_squares

from editlab.data import EditDataModule
from editlab.edits.calibration import FLOOR, AccuracyLaw, Calibration, MeasuredRow, PerplexityLaw
from editlab.edits.forecast import FactSample, Forecast
from editlab.errors import UserError
from editlab.experiments.csv_files import Row, read_rows
from editlab.experiments.described_runs import Described, NotDescribed, described, require
from editlab.experiments.plan import Options, cases
from editlab.experiments.spec import load_experiment
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.fingerprint import fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.utils.progress import progress
from editlab.values.settings import ValueSettings

log = logging.getLogger(__name__)

MOST = 2000
"""Largest number of edits of a row that is used: beyond, a dry solve takes minutes."""
POINTS = 4
"""Largest number of rows of one case: its snapshots and its end. Neighboring snapshots say the same."""
COVERED = 0.9
"""Fraction of the predictions whose error is at most the one that the laws state."""


# ---- measured rows and their forecasts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The mean over seeds of what was measured of a case after some edits."""

    source: str
    case: str
    edits: int
    seeds: int
    accuracy: float
    ratio: float | None


def measured(tables: Sequence[Path]) -> list[Measured]:
    """Means over seeds of the rows of tables of runs, followed by tables of their snapshots.

    A snapshot has no perplexity of the unedited model: that of its run's row is taken, and of the beginning of the text
    where the row has it, since snapshots read no more.
    """
    before: dict[tuple[str, str], float] = {}
    found: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    source: dict[tuple[str, int], str] = {}
    for path in tables:
        for row in read_rows(path):
            if "retained/accuracy" not in row or "edits" not in row:
                continue
            run, key = (row["case"], row["seed"]), (row["case"], int(row["edits"]))
            if "before/perplexity" in row:
                before[run] = float(row.get("before/perplexity_start") or row["before/perplexity"])
            elif source.get(key) not in (None, path.name):
                continue  # the last snapshot is the run's own row
            source[key] = path.name
            found.setdefault(key, []).append((float(row["retained/accuracy"]), _ratio(row, before.get(run))))
    means = []
    for (case, edits), rows in found.items():
        ratios = [math.log(ratio) for _, ratio in rows if ratio is not None]
        ratio = math.exp(fmean(ratios)) if ratios else None
        name = f"{source[case, edits]}: {case}"
        means.append(Measured(name, case, edits, len(rows), fmean(accuracy for accuracy, _ in rows), ratio))
    return means


def _ratio(row: Row, before: float | None) -> float | None:
    if "perplexity_ratio" in row:
        return float(row["perplexity_ratio"])
    if before is None or "retained/perplexity" not in row:
        return None
    return float(row["retained/perplexity"]) / before


def forecast_rows(
    experiment: Path, tables: Sequence[Path], moments: str | None = None
) -> tuple[list[tuple[MeasuredRow, Forecast]], str, str]:
    """The measured rows of an experiment that a dry solve describes, each with its forecast; the model and its weights.

    Args:
        experiment: its file.
        tables: its tables of runs, followed by those of snapshots.
        moments: text of the second moments in place of the runs' own; ``self`` is sampled by the model.

    Raises:
        UserError: No row can be used.
    """
    spec = load_experiment(experiment)
    recipe = yaml.safe_load((spec.project / spec.recipe).read_text(encoding="utf-8"))
    known = {case.name: case for case in cases(spec, Options(moments=moments), spec.seeds[0])}
    usable: dict[Described, list[Measured]] = {}
    for row in measured(tables):
        try:
            require(row.case in known, "the experiment has no such case any more")
            require(row.edits <= MOST, f"it has more than {MOST} edits")
            usable.setdefault(described(recipe, known[row.case]), []).append(row)
        except NotDescribed as reason:
            log.info("Left out: %s after %d edits: %s", row.source, row.edits, reason)
    if not usable:
        raise UserError(f"No row of {', '.join(map(str, tables))} can be forecast: see the reasons above.")
    names = {one.language_model for one in usable}
    if len(names) > 1:
        raise UserError(f"{experiment} has rows of several models ({', '.join(sorted(names))}): calibrate one.")
    lm = LanguageModel.from_name(names.pop(), torch.float32)
    found: list[tuple[MeasuredRow, Forecast]] = []
    for data, moment_settings in dict.fromkeys((one.data, one.moments) for one in usable):
        group = {one: rows for one, rows in usable.items() if (one.data, one.moments) == (data, moment_settings)}
        found += _forecasts(lm, group, dict(data), dict(moment_settings))
    return found, next(iter(usable)).language_model, fingerprint(lm.model)


def _forecasts(
    lm: LanguageModel,
    group: Mapping[Described, Sequence[Measured]],
    data: Mapping[str, Any],
    moments: Mapping[str, Any],
) -> list[tuple[MeasuredRow, Forecast]]:
    edits = max(row.edits for rows in group.values() for row in rows)
    module = EditDataModule(**data)
    module.setup()
    layers = sorted({layer for one in group for layer in one.candidate.layers})
    tops = {max(one.candidate.layers) for one in group}
    if len(tops) > 1:
        raise UserError(f"Rows have several highest layers ({sorted(tops)}), at which values differ: calibrate one.")
    name = next(iter(group)).language_model
    sample = FactSample.measure(
        lm, name, module.candidates[:edits], edits, layers, None, ValueSettings(), ContextSettings(),
        MomentSettings(**moments),
    )  # fmt: skip
    found = []
    with progress(group.items(), desc="Forecasts", unit="case") as bar:
        for one, rows in bar:
            wanted = {row.edits: row for row in thinned(rows)}
            forecasts = sample.first(max(wanted)).forecast(one.candidate, one.batch_size, sorted(wanted))
            found += [(_row(wanted[f.edits], f), f) for f in forecasts]
    return found


def thinned(rows: Sequence[Measured]) -> list[Measured]:
    """The rows of a case, at most :data:`POINTS`, evenly spaced over its edits, the last among them."""
    ordered = sorted(rows, key=lambda row: row.edits)
    if len(ordered) <= POINTS:
        return ordered
    return [ordered[round(step * (len(ordered) - 1) / POINTS)] for step in range(1, POINTS + 1)]


def _row(row: Measured, forecast: Forecast) -> MeasuredRow:
    return MeasuredRow(
        row.source, row.seeds, forecast.candidate, row.edits, forecast.batch_size, round(row.accuracy, 4),
        None if row.ratio is None else round(row.ratio, 4), round(float(forecast.held.mean()), 4),
        round(float(forecast.crosstalk.mean()), 4),
        round(forecast.drift, 4), float(f"{forecast.harm:.4g}"),
    )  # fmt: skip


# ---- the fit --------------------------------------------------------------------------------------------------------


def fit(
    pairs: Sequence[tuple[MeasuredRow, Forecast]], model: str, weights: str, provenance: Mapping[str, Any]
) -> Calibration:
    """Fits both laws by least squares; errors are of configurations that were left out of the fit.

    Args:
        pairs: measured rows with their forecasts.
        model: name of the model.
        weights: fingerprint of its weights.
        provenance: what the rows were made with.

    Raises:
        UserError: There are fewer than four configurations, or fewer with a perplexity.
    """
    with_ratio = [(row, forecast) for row, forecast in pairs if row.ratio is not None]
    for some, what in ((pairs, ""), (with_ratio, " with a perplexity")):
        count = len({forecast.candidate for _, forecast in some})
        if count < 4:
            raise UserError(f"There are {count} measured configurations{what}: give tables with four or more.")
    accuracy, perplexity = _accuracy_law(pairs), _perplexity_law(with_ratio)
    left_out = _left_out(pairs, _accuracy_law, lambda law, row, f: abs(law(f) - row.accuracy))
    ratios = _left_out(with_ratio, _perplexity_law, _relative_error)
    accuracy = replace(accuracy, error=round(float(np.quantile(left_out, COVERED)), 4))
    perplexity = replace(perplexity, error=round(float(np.quantile(ratios, COVERED)), 4))
    return Calibration(model, weights, accuracy, perplexity, tuple(row for row, _ in pairs), provenance)


def _left_out(pairs: Any, law: Any, error: Any) -> list[float]:
    """The error of each pair by a law fitted without its configuration."""
    found = []
    for candidate in {forecast.candidate: None for _, forecast in pairs}:
        fitted = law([pair for pair in pairs if pair[1].candidate != candidate])
        found += [error(fitted, row, forecast) for row, forecast in pairs if forecast.candidate == candidate]
    return found


def _relative_error(law: PerplexityLaw, row: MeasuredRow, forecast: Forecast) -> float:
    assert row.ratio is not None
    predicted = math.log(law(forecast.harm))
    return abs(math.log(row.ratio) - predicted) / (predicted + FLOOR)


def _accuracy_law(pairs: Sequence[tuple[MeasuredRow, Forecast]]) -> AccuracyLaw:
    def off(numbers: Any) -> list[float]:
        law = _law(numbers)
        return [law(forecast) - row.accuracy for row, forecast in pairs]

    found = least_squares(off, [5.0, 4.0, 10.0, 1.0], bounds=([-np.inf, 0, 0, 0], np.inf)).x
    return _law(found.round(4))


def _law(numbers: Any) -> AccuracyLaw:
    intercept, held, crosstalk, drift = map(float, numbers)
    return AccuracyLaw(intercept, held, crosstalk, drift, error=0.0)


def _perplexity_law(pairs: Sequence[tuple[MeasuredRow, Forecast]]) -> PerplexityLaw:
    harms = np.array([forecast.harm for _, forecast in pairs])
    logs = np.array([math.log(row.ratio or 1.0) for row, _ in pairs])

    def off(numbers: Any) -> Any:
        slope, power = numbers
        return (np.exp(slope) * harms**power - logs) / (np.abs(logs) + FLOOR)

    slope, power = least_squares(off, [0.0, 1.0]).x
    return PerplexityLaw(round(float(np.exp(slope)), 4), round(float(power), 4), error=0.0)


def calibrate(
    groups: Sequence[Sequence[Path]], moments: str | None, made: Mapping[str, str]
) -> tuple[Calibration, list[Row]]:
    """The calibration on the rows of several experiments, and a table of the rows with what the laws predict.

    Args:
        groups: for each experiment its file, its table of runs, and tables of snapshots.
        moments: as for :func:`forecast_rows`.
        made: what it is made with, for its provenance.

    Raises:
        UserError: A row cannot be used, rows are of several models, or there are too few.
    """
    pairs: list[tuple[MeasuredRow, Forecast]] = []
    models: set[tuple[str, str]] = set()
    for experiment, *tables in groups:
        found, *model = forecast_rows(experiment, tables, moments)
        pairs += found
        models.add((model[0], model[1]))
    if len(models) > 1:
        raise UserError(f"The experiments have several models ({', '.join(sorted(n for n, _ in models))}): take one.")
    ((name, weights),) = models
    provenance = {"tables": [table.name for _, *tables in groups for table in tables], "moments": moments or "as run"}
    laws = fit(pairs, name, weights, {**provenance, **made})
    return laws, [{**_predicted(laws, row, forecast), **made} for row, forecast in pairs]


def _predicted(laws: Calibration, row: MeasuredRow, forecast: Forecast) -> Row:
    """A measured row with the predictions of the laws, for a CSV file."""
    one = row.candidate
    settings: Row = {
        "case": row.source.partition(": ")[2], "table": row.source.partition(": ")[0], "seeds": row.seeds,
        "edits": row.edits, "batch_size": row.batch_size, "layers": " ".join(map(str, one.layers)),
        "covariance_weight": one.weight, "mu": one.mu, "preserve_prompt_tokens": one.context_weight,
        "memory": "consolidated" if one.memory else "none", "held": row.held, "crosstalk": row.crosstalk,
        "drift": row.drift,
        "harm": row.harm, "retained/accuracy": row.accuracy,
        "predicted/accuracy": round(laws.accuracy(forecast), 4),
    }  # fmt: skip
    if row.ratio is not None:
        settings |= {"perplexity_ratio": row.ratio}
    return settings | {"predicted/perplexity_ratio": round(laws.perplexity(forecast.harm), 4)}
