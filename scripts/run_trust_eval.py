"""Does the gate reject what does harm? Forks, injected faults, and sequences beyond capacity; and what it buys.

    python scripts/run_trust_eval.py                  # every case, three seeds; goes on where it stopped
    python scripts/run_trust_eval.py --only faulty faulty_gate --seeds 1
    python scripts/run_trust_eval.py --dry-run

Writes ``results/trust_eval.csv``, ``results/trust_roc.csv``, ``results/trust_effect.csv``,
``results/trust_events.jsonl``, ``figs/trust_roc.png`` and ``figs/rollback_effect_curve.png`` from the runs that are
there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults import KINDS
from sweep import (
    ROOT,
    Case,
    Run,
    add_texts,
    at_hand,
    common_flags,
    exit_where_failed,
    in_a_sentence,
    parser,
    planned,
    run_all,
)
from tables import provenance_of, provenance_of_all, update_table, write_rows
from trust_labels import SIGNALS, Batch, areas, is_bad, rates, read_batches, taus

from editlab.evaluation.evaluator import BUILTIN_TEXT
from editlab.experiments.figures import roc_figure
from editlab.runs.event_log import EventLog
from editlab.runs.figures import BLACK, BLUE, GREEN, ORANGE, VERMILION, draw_band, legend_below, new_figure, save_figure
from editlab.utils.files import atomic_file

RECIPE = "configs/emmet_trust.yaml"
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
LABELLED = ("faulty_gate", "clean_gate", "beyond_gate")
"""Cases whose batches have labels."""
DRAWN = ("injected", "fork")
"""Kinds of labels that have an ROC curve."""


def gate(**settings: Any) -> dict[str, Any]:
    """The gate as recommended, but for ``settings``."""
    return {"class_path": "TrustRollback", "init_args": settings}


def faults(seed: int, share: float, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """The callback that spoils batches and measures the good ones."""
    settings = {"seed": seed, "share": share, "kinds": list(kinds)}
    return {"class_path": "scripts.faults.InjectFaults", "init_args": settings}


def cases(seed: int, text: str) -> list[Case]:
    """All cases of one seed, the ones that matter most first; the fork takes the perplexity of ``text``, a file."""
    fork = {"class_path": "scripts.fork.ForkLabels", "init_args": {"text": text}}
    weak = {"model.layers": [6], "model.keys": "mean", "model.preserve_prompt_tokens": 0,
            "model.method.init_args.covariance_weight": 1}  # fmt: skip
    subtle = [kind for kind in KINDS if kind != "norm"]  # one batch of that kind alone destroys the model
    return [
        Case("faulty_gate", {}, [faults(seed, 0.1), gate(), fork]),
        Case("faulty", {}, [faults(seed, 0.1)]),
        Case("clean_gate", {}, [faults(seed, 0.0), gate(), fork]),
        Case("clean", {}, [faults(seed, 0.0)]),
        Case("subtle_gate", {}, [faults(seed, 0.1, subtle), gate()]),
        Case("subtle", {}, [faults(seed, 0.1, subtle)]),
        Case("beyond_gate", weak, [faults(seed, 0.0), gate(), fork]),
        Case("beyond", weak, [faults(seed, 0.0)]),
        Case("faulty_edit", {}, [faults(seed, 0.1), gate(granularity="edit", neighbor_samples=10)]),
        Case("faulty_scale", {}, [faults(seed, 0.1), gate(action="scale")]),
        # Values are found anew in every step, so that the gate's share of the time is that of a run without any cache.
        Case("timed_gate", {"model.values.reference": "current"}, [faults(seed, 0.0), gate()]),
    ]


def labelled(runs: Sequence[Run]) -> dict[str, tuple[list[Batch], list[bool]]]:
    """Batches and whether they were bad, by kind of label; kinds of which there are not two classes are left out."""
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


def table(labels: dict[str, tuple[list[Batch], list[bool]]]) -> list[dict[str, Any]]:
    """One row for each kind of label, gate and threshold."""
    rows = []
    for kind, (batches, bad) in labels.items():
        for name in SIGNALS:
            suspicion = [batch.suspicion[name] for batch in batches]
            whole = {"labels": kind, "gate": name, "batches": len(batches), **areas(suspicion, bad)}
            # A baseline's threshold is set so that it rejects as many batches as trust does.
            for threshold in THRESHOLDS:
                trust = [batch.suspicion["trust"] for batch in batches]
                rejected = sum(s > 1 - threshold for s in trust)
                ordered = sorted(suspicion, reverse=True)
                limit = 1 - threshold if name == "trust" else ordered[min(rejected, len(ordered) - 1)]
                rows.append({**whole, "threshold": threshold, **rates(suspicion, bad, limit)})
        never = rates([0.0] * len(bad), bad, 1.0)
        rows.append({"labels": kind, "gate": "always accept", "batches": len(batches), **never})
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def effect(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: what became of the facts of the batches that were not spoilt, and of the perplexity."""
    rows = []
    for run in runs:
        found = json.loads((run.folder / "faults.json").read_text())
        assert run.summary is not None
        before = run.summary["perplexity"].get("before", math.nan)
        points = [point["perplexity/heldout"] / before - 1 for point in found["curve"].values()] or [math.nan]
        spent = sum(e["seconds"] for e in EventLog(run.folder / "trust_events.jsonl").read() if e["kind"] == "batch")
        good = set(range(found["batches"])) - {int(step) for step in found["faults"]}
        rows.append(
            {"case": run.case.name, "seed": run.seed, "good_accuracy": found["good"]["accuracy"],
             "good_ES": found["good"].get("ES"), "good_NS": found["good"].get("NS"),
             "mean_perplexity_rise": sum(points) / len(points), "final_perplexity_rise": points[-1],
             "good_batches_rejected": len(good - set(found["kept"])) / len(good),
             "faulty_batches_kept": len(set(found["kept"]) - good), "seconds": run.summary["seconds"],
             "gate_seconds": spent, **provenance_of(run)}
        )  # fmt: skip
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def points(labels: dict[str, tuple[list[Batch], list[bool]]]) -> list[dict[str, Any]]:
    """One row for each kind of label that is drawn, gate and limit: from rejecting nothing to rejecting everything."""
    rows = []
    for kind, (batches, bad) in labels.items():
        for name in SIGNALS if kind in DRAWN else ():
            suspicion = [batch.suspicion[name] for batch in batches]
            for limit in (*sorted(set(suspicion), reverse=True), -math.inf):
                found = rates(suspicion, bad, limit)
                kept = {k: round(found[k], 4) for k in ("false_positive_rate", "recall", "precision")}
                rows.append({"labels": kind, "gate": name, **kept})
    return rows


def draw_effect(runs: Sequence[Run], path: Path) -> None:
    """Retained accuracy of good edits and perplexity over edits, with and without the gate."""
    figure, axes = new_figure(1, 2, width=3.8, height=3.0)
    shown = {
        "clean": ("no faults, no gate", BLACK, ":"),
        "faulty": ("faults, no gate", VERMILION, "--"),
        "faulty_gate": ("faults, gate", BLUE, "-"),
        "subtle": ("all but the worst fault, no gate", ORANGE, "--"),
        "subtle_gate": ("all but the worst fault, gate", GREEN, "-"),
    }
    for case, (label, color, line) in shown.items():
        read = [json.loads((run.folder / "faults.json").read_text())["curve"] for run in runs if run.case.name == case]
        curves = [{int(edits): point for edits, point in curve.items()} for curve in read]
        for ax, name in zip(axes, ("accuracy", "perplexity/heldout"), strict=True):
            draw_band(ax, curves, name, label=label, color=color, linestyle=line)
    axes[0].set(title="retained accuracy of good edits", xlabel="edits", ylim=(-0.03, 1.03))
    axes[1].set(title="held-out perplexity", xlabel="edits", yscale="log")
    legend_below(figure, columns=2)
    save_figure(figure, path)


@in_a_sentence
def main() -> None:
    """Runs what is missing; writes tables and figures."""
    shared = parser(__doc__, work=ROOT / "lightning_logs" / "trust_eval", batch_size=10)
    add_texts(shared)
    options = shared.parse_args()
    common = {
        **common_flags(options),
        "model.layers": [2, 3, 4, 5, 6], "model.method.init_args.covariance_weight": 1000,
        "model.evaluation.heldout_tokens": 2048,
    }  # fmt: skip
    text = str(BUILTIN_TEXT) if options.heldout == "builtin" else options.heldout
    runs = [
        run
        for seed in dict.fromkeys(options.seeds)
        for run in planned(
            [case.over(common) for case in cases(seed, text)],
            RECIPE,
            argparse.Namespace(**{**vars(options), "seeds": [seed]}),
        )
    ]
    every = [case.over(common) for case in cases(options.seeds[0], text)]
    run_all(runs, options, at_hand(every, RECIPE, options))
    done = [] if options.dry_run else at_hand(every, RECIPE, options)  # labels are made of all of them
    if done:
        write(done, options)
    exit_where_failed(runs, options)


def write(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Tables, figures, and the events of one run."""
    results, figs = options.out / "results", options.out / "figs"
    update_table(results / "trust_effect.csv", effect(runs), [case.name for case in cases(options.seeds[0], "")])
    draw_effect(runs, figs / "rollback_effect_curve.png")
    labels = labelled(runs)
    if labels:
        shared = provenance_of_all([provenance_of(run) for run in runs if run.case.name in LABELLED])
        write_rows([{**row, **shared} for row in table(labels)], results / "trust_eval.csv")
        write_rows([{**row, **shared} for row in points(labels)], results / "trust_roc.csv")
        save_figure(roc_figure(points(labels)), figs / "trust_roc.png")
    for run in runs:
        if run.case.name == "faulty_gate" and run.seed == options.seeds[0]:
            with atomic_file(results / "trust_events.jsonl") as temporary:
                shutil.copy(run.folder / "trust_events.jsonl", temporary)


if __name__ == "__main__":
    main()
