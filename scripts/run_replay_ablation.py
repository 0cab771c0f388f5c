"""What replay does for retention: rates, capacities and policies, consolidated memory, and the joint batch as ceiling.

    python scripts/run_replay_ablation.py                     # every case, three seeds; goes on where it stopped
    python scripts/run_replay_ablation.py --only none consolidated --seeds 1
    python scripts/run_replay_ablation.py --dry-run

Writes ``results/replay_ablation.csv`` (a row a run), ``results/replay_ablation_means.csv`` (a row a case, with the gain
over no replay) and ``figs/forgetting_replay.png`` (and ``.pdf``) from the runs that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweep import ROOT, Case, Run, against, interval, parser, run_all, write_rows, write_table

from editlab.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, draw_band, new_figure, save_figure

RECIPE = "configs/emmet_consolidated.yaml"
CURVE = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 128, "sample": 64}}
TEXT = ROOT.parent / "shared" / "data" / "text"

SHOWN = {
    "none": ("no replay", BLACK, ":"),
    "random_0.3_200": ("random, rate 0.3", ORANGE, "--"),
    "priority_0.3_200": ("priority, rate 0.3", SKY, "-."),
    "random_3_500": ("random, rate 3", PURPLE, "--"),
    "both": ("consolidated, and the least likely", GREEN, "-"),
    "consolidated": ("consolidated", BLUE, "-"),
    "joint": ("one joint batch", VERMILION, "none"),
}
"""case -> label, color, line"""
PANELS = (
    ("retained/ES", "retained ES"),
    ("retained/accuracy", "retained accuracy"),
    ("retained/NS", "neighbors (NS)"),
    ("perplexity/heldout", "held-out perplexity"),
)


def replay(name: str, flags: dict[str, Any] | None = None, **settings: Any) -> Case:
    """A case with MemoryReplay in it."""
    callback = {"class_path": "MemoryReplay", "init_args": settings}
    labels = {
        k: settings[k]
        for k in ("memory", "sampling", "rate", "capacity", "weight", "repair", "refresh")
        if k in settings
    }
    return Case(name, flags or {}, [callback, CURVE], labels)


def cases(edits: int) -> list[Case]:
    """All cases, the ones that matter most first."""
    consolidated = {"memory": "consolidated"}
    current = {"model.values.reference": "current"}
    one_layer = {"model.layers": [6], "model.keys": "mean", "model.preserve_prompt_tokens": 0,
                 "model.rule.init_args.covariance_weight": 1}  # fmt: skip
    best = {"rate": 0.3, "capacity": 200}
    found = [
        Case("none", {}, [CURVE]),
        replay("both", memory="both", sampling="loss", refresh_every=2, **best),
        replay("consolidated", **consolidated),
        Case("joint", {"data.batch_size": edits}, [CURVE]),
        replay("random_0.3_200", sampling="random", **best),
        replay("priority_0.3_200", sampling="priority", **best),
        replay("random_1_500", sampling="random", rate=1.0, capacity=500),
        replay("random_3_500", sampling="random", rate=3.0, capacity=500),
        replay("spare_3_500", sampling="random", rate=3.0, capacity=500, repair=0.0),
        replay("loss", sampling="loss", refresh_every=2, **best),
        replay("loss_10", sampling="loss", refresh_every=2, weight=10.0, **best),
        replay("refresh", sampling="loss", refresh_every=2, refresh="values", **best),
        replay("priority_10", sampling="priority", weight=10.0, **best),
        replay("both_random", memory="both", sampling="random", **best),
        replay("both_priority", memory="both", sampling="priority", **best),
        Case("one_layer", one_layer, [CURVE]),
        replay("one_layer_random", one_layer, sampling="random", **best),
        Case("none_current", current, [CURVE]),
        replay("consolidated_current", current, **consolidated),
    ]
    grid = [
        replay(f"{sampling}_{rate}_{capacity}", sampling=sampling, rate=rate, capacity=capacity)
        for sampling in ("random", "priority")
        for rate in (0.1, 0.3, 0.5)
        for capacity in (50, 100, 200)
    ]
    return found + [case for case in grid if case.name not in {other.name for other in found}]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Retained ES, accuracy, NS and perplexity over edits; bands are the range over seeds."""
    figure, axes = new_figure(1, 4, width=3.2, height=2.9)
    for ax, (name, title) in zip(axes, PANELS, strict=True):
        for case, (label, color, line) in SHOWN.items():
            curves = [run.curve() for run in runs if run.case.name == case]
            draw_band(ax, curves, name, label=label, color=color, linestyle=line)
        ax.set(title=title, xlabel="edits")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


MEASURES = {
    "accuracy": lambda s: s["retained"]["accuracy"],
    "ES": lambda s: s["retained"]["ES"],
    "NS": lambda s: s["retained"]["NS"] - s["before"]["NS"],
    "perplexity_ratio": lambda s: s["perplexity"]["after"] / s["perplexity"]["before"],
}
"""name -> number of a run's summary; NS as the change from the unedited model"""


def means(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a case: means over seeds, and the gain in retained accuracy over no replay with its 95% interval."""
    gains = against(runs, "none", MEASURES["accuracy"])
    rows = []
    for case in dict.fromkeys(run.case.name for run in runs):
        some = [run.summary for run in runs if run.case.name == case]
        row: dict[str, Any] = {"case": case, "seeds": len(some)}
        row |= {name: round(interval([measure(s) for s in some])[0], 4) for name, measure in MEASURES.items()}
        found = gains.get(case, (float("nan"),) * 3)
        row |= {f"accuracy_gain{end}": round(x, 4) for end, x in zip(("", "_low", "_high"), found, strict=True)}
        rows.append(row)
    return rows


def main() -> None:
    """Runs what is missing; writes the tables and the figure."""
    shared = parser(__doc__, work=ROOT / "lightning_logs" / "replay_ablation")
    texts = {"heldout": TEXT / "wikitext2_test.txt", "moments": TEXT / "wikitext2_valid.txt"}
    heldout, moments = (str(path) if path.exists() else None for path in texts.values())
    shared.add_argument("--heldout", default=heldout or "builtin", help="text of the perplexity")
    shared.add_argument("--moments", default=moments or "self", help="text of the second moments")
    options = shared.parse_args()
    common = {
        "data.path": options.path,
        "data.limit": options.edits,
        "data.batch_size": options.batch_size,
        "model.evaluation.immediate": "edits",
        "model.evaluation.neighbors": 3,
        "model.evaluation.heldout": options.heldout,
        "model.evaluation.generated_texts": 0,
        "model.moments.text": options.moments,
        "model.moments.tokens": 24576 if options.moments == "self" else 160000,
    }
    wanted = [Case(c.name, {**common, **c.flags}, c.callbacks, c.labels) for c in cases(options.edits)]
    runs = run_all(wanted, RECIPE, options)
    if runs:
        write_table(runs, ROOT / "results" / "replay_ablation.csv")
        write_rows(means(runs), ROOT / "results" / "replay_ablation_means.csv")
        draw(runs, ROOT / "figs" / "forgetting_replay.png")
        print("results/replay_ablation.csv, replay_ablation_means.csv and figs/forgetting_replay.png are written")


if __name__ == "__main__":
    main()
