"""Main effects of the factors of an experiment whose cases are a fraction of all combinations.

Each measure is explained by an additive model, one effect for each level of each factor against the factor's first
level, and one for each seed (a block). Its coefficients are found by least squares, their 95% intervals are
t-intervals, and the p-values of one measure are corrected as a family (Holm).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from editlab.experiments.csv_files import Row
from editlab.experiments.plan import Run
from editlab.experiments.statistics import holm
from editlab.experiments.tables import MEASURES, rows_of_runs

log = logging.getLogger(__name__)

EXPLAINED = ("retained/ES", "retained/accuracy", "retained/paraphrase_accuracy", "NS_change", "log_perplexity_ratio")
"""Measures whose effects are computed; those of the perplexity ratio are factors, and add up as logarithms."""


def main_effects(runs: Sequence[Run]) -> list[Row]:
    """A row for each measure and each level but the first of each factor: the effect, its interval, and its p-value.

    Args:
        runs: finished ones; the labels of their cases are the factors.

    Returns:
        No rows as long as there are too few finished runs to determine all effects and their error; none of a measure
        that a run lacks.
    """
    factors = {name: list(dict.fromkeys(str(run.case.labels[name]) for run in runs)) for name in _factors(runs)}
    factors["seed"] = list(dict.fromkeys(str(run.seed) for run in runs))
    columns = [(name, level) for name, levels in factors.items() for level in levels[1:]]
    design = np.array([[1.0, *(float(_level(run, name) == level) for name, level in columns)] for run in runs]).reshape(
        len(runs), 1 + len(columns)
    )
    if len(runs) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        log.info("The main effects need more finished runs than these %d", len(runs))
        return []
    measured = rows_of_runs(runs)
    found = []
    for measure in EXPLAINED:
        try:
            values = np.array([_number(row, measure) for row in measured])
        except (KeyError, ValueError):
            log.warning("There are no main effects on %s, which some of the runs have not measured", measure)
            continue
        effects, halves, ps = _least_squares(design, values)
        shown = [i for i, (name, _) in enumerate(columns) if name != "seed"]
        corrected = dict(zip(shown, holm([ps[1 + i] for i in shown]), strict=True))
        for i in shown:
            name, level = columns[i]
            row: Row = {"measure": measure, "factor": name, "level": level, "against": factors[name][0]}
            row |= {"effect": round(effects[1 + i], 4), "effect_low": round(effects[1 + i] - halves[1 + i], 4),
                    "effect_high": round(effects[1 + i] + halves[1 + i], 4), "p_holm": float(f"{corrected[i]:.2g}"),
                    "runs": len(runs)}  # fmt: skip
            found.append(row)
    return found


def _factors(runs: Sequence[Run]) -> list[str]:
    """Labels that all cases have and that differ between some."""
    names = [name for name in (runs[0].case.labels if runs else {}) if all(name in run.case.labels for run in runs)]
    return [name for name in names if len({str(run.case.labels[name]) for run in runs}) > 1]


def _level(run: Run, factor: str) -> str:
    return str(run.seed if factor == "seed" else run.case.labels[factor])


def _number(row: Mapping[str, Any], measure: str) -> float:
    if measure == "log_perplexity_ratio":
        return math.log(MEASURES["perplexity_ratio"](row))
    return MEASURES[measure](row)


def _least_squares(design: Any, values: Any) -> tuple[list[float], list[float], list[float]]:
    """Coefficients, half widths of their 95% t-intervals, and two-sided p-values of no effect."""
    coefficients, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ coefficients
    freedom = len(values) - design.shape[1]
    variance = float(residual @ residual) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    rounding = 1e-9 * max(1.0, float(np.abs(values).max()))
    if math.sqrt(variance) <= rounding:  # the model explains all: what is left is rounding, and no yardstick
        ps = np.where(np.abs(coefficients) <= rounding, 1.0, 0.0)
    else:
        ps = 2 * stats.t.sf(np.abs(coefficients) / errors, freedom)
    half = float(stats.t.ppf(0.975, freedom))
    return [float(c) for c in coefficients], [half * float(e) for e in errors], [float(p) for p in ps]
