"""Comparisons of an experiment's cases by the outcomes of their edits, for tables of means.

The difference of a case from the baseline is paired over seeds and facts. Its interval and p-value come from a
hierarchical bootstrap (:func:`~editlab.experiments.statistics.paired_bootstrap`), and the p-values of a table's cases
are corrected as one family (:func:`~editlab.experiments.statistics.holm`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from editlab.experiments.csv_files import Row
from editlab.experiments.plan import Run
from editlab.experiments.spec import CompareSpec
from editlab.experiments.statistics import Difference, holm, paired_bootstrap
from editlab.metrics.names import full_name
from editlab.runs.folders import RunFolder
from editlab.runs.outcomes import outcome_values

log = logging.getLogger(__name__)

LEVEL = 0.05
"""Corrected p-value below which a difference is marked."""

Values = Mapping[str, Mapping[int, Mapping[Any, float]]]
"""case -> seed -> fact -> value"""


def values_of_runs(runs: Sequence[Run], metric: str, group: str) -> Values:
    """The value of a metric for each fact of each run that has written its outcomes."""
    found: dict[str, dict[int, Mapping[Any, float]]] = {}
    for run in runs:
        folder = RunFolder(run.folder)
        if folder.has_outcomes and (values := outcome_values(folder.outcomes, metric, group)):
            found.setdefault(run.case.name, {})[run.seed] = values
    return found


def differences(values: Values, baseline: str, cases: Sequence[str]) -> dict[str, tuple[Difference, float]]:
    """For each case that shares facts with the baseline, their difference and its p-value after Holm's correction."""
    found = {
        case: difference
        for case in cases
        if case != baseline and (difference := paired_bootstrap(values.get(case, {}), values.get(baseline, {})))
    }
    corrected = holm([difference.p for difference in found.values()])
    return {case: (difference, p) for (case, difference), p in zip(found.items(), corrected, strict=True)}


def with_comparison(rows: Sequence[Row], runs: Sequence[Run], spec: CompareSpec) -> list[Row]:
    """The rows of a table of means with the columns of a comparison.

    The columns are named after the metric, such as ``retained/accuracy_difference``, ``..._low``, ``..._high``,
    ``retained/accuracy_p_holm`` and ``retained/accuracy_survives`` (``yes`` or ``no``), with ``compared_with``,
    ``compared_seeds`` and ``compared_facts``. They are empty for cases whose runs have no outcomes, as those of older
    versions of editlab.

    Args:
        rows: one for each case.
        runs: finished runs of the experiment.
        spec: baseline, metric and group.
    """
    cases = [row["case"] for row in rows if row.get("seeds")]
    found = differences(values_of_runs(runs, spec.metric, spec.group), spec.baseline, cases)
    lacking = [case for case in cases if case not in found and case != spec.baseline]
    if lacking:
        log.warning(
            "%s cannot be compared with %s by %s, as there is no fact that both have an outcome of.",
            ", ".join(lacking), spec.baseline, spec.metric,
        )  # fmt: skip
    return [{**row, **(_columns(spec, *found[row["case"]]) if row["case"] in found else {})} for row in rows]


def _columns(spec: CompareSpec, difference: Difference, p: float) -> Row:
    name = full_name(spec.group, spec.metric)
    return {
        f"{name}_difference": round(difference.difference, 4),
        f"{name}_difference_low": round(difference.low, 4),
        f"{name}_difference_high": round(difference.high, 4),
        f"{name}_p_holm": float(f"{p:.2g}"),
        f"{name}_survives": "yes" if p < LEVEL else "no",
        "compared_with": spec.baseline,
        "compared_seeds": difference.seeds,
        "compared_facts": difference.facts,
    }
