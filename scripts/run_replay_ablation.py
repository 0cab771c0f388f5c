"""What replay does for retention: rates, capacities and policies, consolidated memory, and the joint batch as ceiling.

    python scripts/run_replay_ablation.py                     # every case, three seeds; goes on where it stopped
    python scripts/run_replay_ablation.py --only none consolidated --seeds 1
    python scripts/run_replay_ablation.py --dry-run

Writes ``results/replay_ablation.csv`` (a row a run), ``results/replay_ablation_means.csv`` (a row a case, with the gain
over no replay), ``results/replay_ablation_curves.csv`` (a row a snapshot) and, from it,
``figs/forgetting_replay.png`` (and ``.pdf``). Rows of runs that are not at hand stay as they are.
"""

from __future__ import annotations

from typing import Any

from sequences import Sequences
from sweep import ROOT, Case

from editlab.runs.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

CURVE = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 128, "sample": 64}}

SHOWN = {
    "none": ("no replay", BLACK, ":"),
    "random_0.3_200": ("random, rate 0.3", ORANGE, "--"),
    "priority_0.3_200": ("priority, rate 0.3", SKY, "-."),
    "spare_3_500": ("random, rate 3, only spared", PURPLE, "--"),
    "both": ("consolidated, and the least likely", GREEN, "-"),
    "consolidated": ("consolidated", BLUE, "-"),
    "joint": ("one joint batch", VERMILION, "none"),
}
"""case -> label, color, line"""
EXPERIMENT = Sequences(
    recipe="configs/emmet_consolidated.yaml",
    work=ROOT / "lightning_logs" / "replay_ablation",
    each="replay_ablation.csv",
    over_seeds="replay_ablation_means.csv",
    curves="replay_ablation_curves.csv",
    figure="forgetting_replay",
    shown=[SHOWN],
    otherwise="none",
)


def replay(name: str, flags: dict[str, Any] | None = None, curve: bool = True, **settings: Any) -> Case:
    """A case with MemoryReplay in it, and the curve where one is to be drawn."""
    callback = {"class_path": "MemoryReplay", "init_args": settings}
    labels = {
        k: settings[k]
        for k in ("memory", "sampling", "rate", "capacity", "weight", "repair", "refresh")
        if k in settings
    }
    return Case(name, flags or {}, [callback, CURVE] if curve else [callback], labels)


def cases(edits: int) -> list[Case]:
    """All cases, the ones that matter most first."""
    consolidated: dict[str, Any] = {"memory": "consolidated"}
    current = {"model.values.reference": "current"}
    firmer = {"model.method.init_args.covariance_weight": 1500}
    one_layer = {"model.layers": [6], "model.keys": "mean", "model.preserve_prompt_tokens": 0,
                 "model.method.init_args.covariance_weight": 1}  # fmt: skip
    best: dict[str, Any] = {"rate": 0.3, "capacity": 200}
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
        Case("none_1500", firmer, []),
        replay("spare_3_500_1500", firmer, sampling="random", rate=3.0, capacity=500, repair=0.0),
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
        replay(f"{sampling}_{rate}_{capacity}", curve=False, sampling=sampling, rate=rate, capacity=capacity)
        for sampling in ("random", "priority")
        for rate in (0.1, 0.3, 0.5)
        for capacity in (50, 100, 200)
    ]
    return found + [case for case in grid if case.name not in {other.name for other in found}]


def main() -> None:
    """Runs what is missing; writes the tables and the figure."""
    EXPERIMENT.main(__doc__, cases)


if __name__ == "__main__":
    main()
