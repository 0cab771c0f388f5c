"""What a LoRA adjustment buys on top of EMMET, alone and with replay, by rank, and what it costs.

    python scripts/run_lora_ablation.py                       # every case, three seeds; goes on where it stopped
    python scripts/run_lora_ablation.py --only emmet lora_8 --seeds 1
    python scripts/run_lora_ablation.py --dry-run

Writes ``results/lora_ablation.csv`` (a row a run), ``results/lora_ablation_means.csv`` (a row a case, with the gain
over the same recipe without LoRA), ``results/lora_ablation_curves.csv`` (a row a snapshot) and, from it,
``figs/lora_ablation.png`` (and ``.pdf``). Rows of runs that are not at hand stay as they are.
"""

from __future__ import annotations

from typing import Any

from sequences import Sequences
from sweep import ROOT, Case

from editlab.runs.figures import BLACK, BLUE, GREEN, ORANGE, VERMILION

CURVE = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": 128, "sample": 64}}
SHOWN = {
    "emmet": ("EMMET", BLACK, ":"),
    "lora_8": ("EMMET + LoRA", BLUE, "-"),
    "replay": ("EMMET + replay", ORANGE, "--"),
    "replay_lora_8": ("EMMET + replay + LoRA", GREEN, "-"),
    "layer_6": ("layer 6 alone", VERMILION, ":"),
    "layer_6_lora_8": ("layer 6 alone + LoRA", VERMILION, "-"),
}
"""case -> label, color, line"""
BASE = {"lora_8": "emmet", "replay_lora_8": "replay", "layer_6_lora_8": "layer_6",
        "emmet_100": "emmet_100", "lora_8_100": "emmet_100"}  # fmt: skip
"""case -> the same without LoRA; ``emmet`` where not named"""
EXPERIMENT = Sequences(
    recipe="configs/emmet_lora.yaml",
    work=ROOT / "lightning_logs" / "lora_ablation",
    each="lora_ablation.csv",
    over_seeds="lora_ablation_means.csv",
    curves="lora_ablation_curves.csv",
    figure="lora_ablation",
    shown=[SHOWN],
    otherwise="emmet",
    base=BASE,
)


def lora(**settings: Any) -> dict[str, Any]:
    """LoRAAdjust as recommended, but for ``settings``."""
    return {"class_path": "LoRAAdjust", "init_args": settings}


def cases(edits: int) -> list[Case]:
    """All cases, the ones that matter most first; a few have a number of edits of their own."""
    replay = {"class_path": "MemoryReplay", "init_args": {"memory": "consolidated"}}
    one_layer = {"model.layers": [6]}
    few = {"data.limit": 100}
    unedited = {"before": 0.0, "unedited": 2.0}
    return [
        Case("emmet", {}, [CURVE]),
        Case("lora_8", {}, [lora(), CURVE], {"rank": 8}),
        Case("layer_6", one_layer, [CURVE]),
        Case("layer_6_lora_8", one_layer, [lora(), CURVE], {"rank": 8}),
        Case("replay", {}, [replay, CURVE]),
        Case("replay_lora_8", {}, [replay, lora(), CURVE], {"rank": 8}),
        Case("emmet_100", few, [CURVE]),
        Case("lora_8_100", few, [lora(), CURVE], {"rank": 8}),
        Case("lora_4", {}, [lora(rank=4), CURVE], {"rank": 4}),
        Case("lora_16", {}, [lora(rank=16), CURVE], {"rank": 16}),
        Case("lora_8_often", {}, [lora(every_n_batches=4, steps=15), CURVE], {"rank": 8}),
        Case("lora_8_attention", {}, [lora(targets="attention"), CURVE], {"rank": 8}),
        Case("lora_8_unedited", {}, [lora(weights=unedited), CURVE], {"rank": 8}),
        Case("lora_8_firm", {}, [lora(weights={"before": 6.0}), CURVE], {"rank": 8}),
    ]


def main() -> None:
    """Runs what is missing; writes the tables and the figure."""
    EXPERIMENT.main(__doc__, cases)


if __name__ == "__main__":
    main()
