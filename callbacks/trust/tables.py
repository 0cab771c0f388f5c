"""Tables and the figure of the experiment ``configs/experiments/trust_eval.yaml``, from its finished runs.

The experiment's file names these functions by import path, so that :mod:`editlab` needs to know nothing of trust.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from callbacks.trust.labels import GATES, Batch, areas, is_bad, paired_difference, rates, read_batches, taus
from editlab.experiments.csv_files import Row
from editlab.experiments.faults import FILE as FAULTS
from editlab.experiments.plan import Run
from editlab.experiments.tables import provenance_of, provenance_of_all
from editlab.runs.event_log import EventLog
from editlab.runs.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    VERMILION,
    draw_band,
    in_print,
    legend_below,
    printed_figure,
)

Labelled = Mapping[str, tuple[list[Batch], list[bool]]]
"""kind of label -> batches, and whether each was bad"""

EVENTS = "trust_events.jsonl"
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
LABELLED = ("faulty_gate", "clean_gate", "beyond_gate")
"""Cases whose batches have labels."""
NORM = "norm only"
"""The gate that others are compared with."""
DRAWN = ("injected", "fork")
"""Kinds of labels that have an ROC curve."""


def labelled(runs: Sequence[Run]) -> Labelled:
    """Batches and whether they were bad, by kind of label; a kind of which all or no batches are bad is left out."""
    batches = {name: [b for run in runs if run.case.name == name for b in read_batches(run.folder)]
               for name in LABELLED}  # fmt: skip
    found: dict[str, tuple[list[Batch], list[bool]]] = {}
    faulty = batches["faulty_gate"]
    if not batches["clean_gate"] or not faulty:
        return found
    found["injected"] = (faulty, [batch.fault is not None for batch in faulty])
    for later, name in ((0, "fork"), (1, "fork, 3 batches later")):
        tau = taus(batches["clean_gate"], later)
        for kind, some in ((name, faulty), (f"beyond capacity, {name}", batches["beyond_gate"])):
            compared = [batch for batch in some if later in batch.losses]
            found[kind] = (compared, [is_bad(batch, tau, later) for batch in compared])
    return {kind: (some, bad) for kind, (some, bad) in found.items() if 0 < sum(bad) < len(bad)}


def effect(runs: Sequence[Run]) -> list[Row]:
    """One row for each run: metrics of the facts of batches without faults, perplexity, and what the gate rejected."""
    rows: list[Row] = []
    for run in runs:
        found = json.loads((run.folder / FAULTS).read_text(encoding="utf-8"))
        before = run.metrics.get("before/perplexity", math.nan)
        points = [point["perplexity"] / before - 1 for point in found["curve"].values()] or [math.nan]
        spent = sum(e["seconds"] for e in EventLog(run.folder / EVENTS).read() if e["kind"] == "batch")
        good = set(range(found["batches"])) - {int(step) for step in found["faults"]}
        rows.append(
            {"case": run.case.name, "seed": run.seed, "good/accuracy": found["good"]["accuracy"],
             "good/ES": found["good"].get("ES"), "good/NS": found["good"].get("NS"),
             "mean_perplexity_rise": sum(points) / len(points), "final_perplexity_rise": points[-1],
             "good_batches_rejected": len(good - set(found["kept"])) / len(good),
             "faulty_batches_kept": len(set(found["kept"]) - good), "seconds": (run.summary or {})["seconds"],
             "gate_seconds": spent, **provenance_of(run)}
        )  # fmt: skip
    return [_rounded(row) for row in rows]


def labelled_batches(runs: Sequence[Run]) -> list[Row]:
    """One row for each batch with a fork: its signals in full precision, its fault, its losses, and whether it is bad.

    A batch is bad if accepting it loses more than any batch without a fault does, in whichever of the runs.
    """
    found = [(run, batch) for run in runs for batch in read_batches(run.folder) if 0 in batch.losses]
    tau = taus([batch for _, batch in found if batch.fault is None], 0)
    rows: list[Row] = []
    for run, batch in found:
        (event,) = [e for e in EventLog(run.folder / EVENTS).read() if e["kind"] == "batch" and e["step"] == batch.step]
        if event["signals"]:
            rows.append(
                {"case": run.case.name, "seed": run.seed, "step": batch.step, "fault": batch.fault or "",
                 "bad": int(is_bad(batch, tau, 0)), **event["signals"], "score": event["score"],
                 **{f"loss_{loss}": round(value, 5) for loss, value in batch.losses[0].items()},
                 **provenance_of(run)}
            )  # fmt: skip
    return rows


def rates_of_gates(runs: Sequence[Run]) -> list[Row]:
    """One row for each kind of label, gate and threshold: error rates and areas."""
    labels = labelled(runs)
    return [{**row, **_provenance(runs)} for row in rates_of_labels(labels)]


def rates_of_labels(labels: Labelled) -> list[Row]:
    """:func:`rates_of_gates` of labelled batches; a baseline's threshold makes it reject as many batches as trust."""
    rows: list[dict[str, Any]] = []
    for kind, (batches, bad) in labels.items():
        for name in GATES:
            suspicion = [batch.suspicion[name] for batch in batches]
            whole = {"labels": kind, "gate": name, "batches": len(batches), **areas(suspicion, bad)}
            over = None if name == NORM else paired_difference(batches, bad, name, NORM)
            if over is not None:
                whole |= {"PR_AUC_over_norm": over.difference, "over_norm_low": over.low, "over_norm_high": over.high,
                          "over_norm_p": over.p}  # fmt: skip
            for threshold in THRESHOLDS:
                trust = [batch.suspicion["trust"] for batch in batches]
                rejected = sum(s > 1 - threshold for s in trust)
                ordered = sorted(suspicion, reverse=True)
                limit = 1 - threshold if name == "trust" else ordered[min(rejected, len(ordered) - 1)]
                rows.append({**whole, "threshold": threshold, **rates(suspicion, bad, limit)})
        never = rates([0.0] * len(bad), bad, 1.0)
        rows.append({"labels": kind, "gate": "always accept", "batches": len(batches), **never})
    return [_rounded(row) for row in rows]


def roc_points(runs: Sequence[Run]) -> list[Row]:
    """One row for each kind of label that is drawn, gate and limit, from rejecting nothing to rejecting everything."""
    return [{**row, **_provenance(runs)} for row in points_of_labels(labelled(runs))]


def points_of_labels(labels: Labelled) -> list[Row]:
    """:func:`roc_points` of labelled batches."""
    rows: list[Row] = []
    for kind, (batches, bad) in labels.items():
        for name in GATES if kind in DRAWN else ():
            suspicion = [batch.suspicion[name] for batch in batches]
            for limit in (*sorted(set(suspicion), reverse=True), -math.inf):
                found = rates(suspicion, bad, limit)
                kept = {k: round(found[k], 4) for k in ("false_positive_rate", "recall", "precision")}
                rows.append({"labels": kind, "gate": name, **kept})
    return rows


def _provenance(runs: Sequence[Run]) -> dict[str, str]:
    return provenance_of_all([provenance_of(run) for run in runs if run.case.name in LABELLED])


def _rounded(row: Mapping[str, Any]) -> Row:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


@in_print
def draw_effect(runs: Sequence[Run]) -> Figure:
    """Retained accuracy of good edits and perplexity over edits, with and without the gate."""
    figure, axes = printed_figure(2, height=2.6)
    shown = {
        "clean": ("no faults, no gate", BLACK, ":"),
        "faulty": ("faults, no gate", VERMILION, "--"),
        "faulty_gate": ("faults, gate", BLUE, "-"),
        "subtle": ("all but the worst fault, no gate", ORANGE, "--"),
        "subtle_gate": ("all but the worst fault, gate", GREEN, "-"),
    }
    for case, (label, color, line) in shown.items():
        read = [json.loads((run.folder / FAULTS).read_text(encoding="utf-8"))["curve"]
                for run in runs if run.case.name == case]  # fmt: skip
        curves = [{int(edits): point for edits, point in curve.items()} for curve in read]
        for ax, name in zip(axes, ("accuracy", "perplexity"), strict=True):
            draw_band(ax, curves, name, label=label, color=color, linestyle=line)
    axes[0].set(title="retained accuracy of good edits", xlabel="edits", ylim=(-0.03, 1.03))
    axes[1].set(title="held-out perplexity", xlabel="edits", yscale="log")
    legend_below(figure, columns=2)
    return figure
