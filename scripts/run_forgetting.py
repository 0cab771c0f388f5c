"""Thousands of edits in sequence: whether the model forgets gradually or all at once, and what moves that point.

    python scripts/run_forgetting.py                               # 2,000 edits, every case, three seeds; resumable
    python scripts/run_forgetting.py --only emmet_5000 consolidated_looser_5000 --seeds 1
    python scripts/run_forgetting.py --dry-run

Writes ``results/large_scale_forgetting.csv`` (a row a run and snapshot), ``results/large_scale_final.csv`` (a row a
run), ``results/large_scale_means.csv``, ``results/large_scale_turns.csv`` (where each run's curve gets steep) and, from
the first, ``figs/large_scale_forgetting.png`` (and ``.pdf``). Rows of runs that are not at hand stay as they are.
"""

from __future__ import annotations

from typing import Any

import yaml
from sequences import Sequences
from sweep import ROOT, Case
from turning import turns

from editlab.runs.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

EVERY, SAMPLE = 200, 128
"""Edits between two snapshots, and past edits asked for at each."""
METHOD = "model.method.init_args."
RULES = {
    "equality_current": ("EMMET as published: equality, layer 6", BLACK, "-"),
    "equality": ("the same, values of the original weights", VERMILION, "-"),
    "rome": ("ROME, layer 6", GREEN, "--"),
    "layer_6": ("EMMET, lambda 1000, layer 6 alone", VERMILION, ":"),
    "emmet": ("EMMET, lambda 1000, layers 2 to 6", BLACK, ":"),
    "alphaedit": ("AlphaEdit, layers 2 to 6", BLUE, "-."),
    "memit": ("MEMIT, weight 15,000, layers 2 to 6", PURPLE, "-."),
}
CALLBACKS = {
    "emmet": ("EMMET, lambda 1000, layers 2 to 6", BLACK, ":"),
    "replay": ("+ replay at rate 0.3", ORANGE, "--"),
    "lora": ("+ LoRA each 512 edits", SKY, "-."),
    "trust": ("+ trust", PURPLE, ":"),
    "consolidated": ("+ consolidated memory", BLUE, "-"),
    "both": ("+ memory and replay", GREEN, "--"),
    "both_lora": ("+ memory, replay and LoRA", GREEN, "-."),
    "consolidated_looser": ("+ memory, prompts' tokens at 0.1", VERMILION, "-"),
    "consolidated_looser_lora": ("that, and LoRA at the end", VERMILION, ":"),
}
LONGER = {
    "emmet_5000": ("EMMET, lambda 1000, layers 2 to 6, 5,000 edits", BLACK, ":"),
    "consolidated_looser_5000": ("+ memory, prompts' tokens at 0.1", VERMILION, "-"),
}
"""The rows of panels: case -> label, color, line."""
EXPERIMENT = Sequences(
    recipe="configs/emmet_consolidated.yaml",
    work=ROOT / "lightning_logs" / "forgetting",
    each="large_scale_final.csv",
    over_seeds="large_scale_means.csv",
    curves="large_scale_forgetting.csv",
    figure="large_scale_forgetting",
    shown=[RULES, CALLBACKS, LONGER],
    otherwise="emmet",
    base={
        "both": "consolidated",
        "both_lora": "both",
        "consolidated_looser": "consolidated",
        "consolidated_looser_lora": "consolidated_looser",
        "emmet_5000": "emmet_5000",
        "consolidated_looser_5000": "emmet_5000",
    },
    also=("large_scale_turns.csv", turns),
)


def thorough(edits: int) -> dict[str, Any]:
    """The adjustment after the last batch of ``configs/emmet_thousands.yaml``, that draws from so many edits."""
    recipe = yaml.safe_load((ROOT / "configs" / "emmet_thousands.yaml").read_text(encoding="utf-8"))
    (found,) = (one for one in recipe["trainer"]["callbacks"] if one["class_path"] == "LoRAAdjust")
    return {**found, "init_args": {**found["init_args"], "replayed": edits}}


def cases(edits: int) -> list[Case]:
    """All cases, the ones that matter most first; the last two have a number of edits of their own."""
    curve = {"class_path": "ForgettingCurve", "init_args": {"every_n_edits": EVERY, "sample": SAMPLE}}
    consolidated = {"class_path": "MemoryReplay", "init_args": {"memory": "consolidated"}}
    sampled = {"sampling": "loss", "refresh_every": 4, "rate": 0.3, "capacity": 500}
    both = {"class_path": "MemoryReplay", "init_args": {"memory": "both", **sampled}}
    replay = {"class_path": "MemoryReplay", "init_args": {"sampling": "random", "rate": 0.3, "capacity": 500}}
    lora = {"class_path": "LoRAAdjust", "init_args": {"every_n_batches": 16}}
    trust = {"class_path": "TrustRollback", "init_args": {}}
    looser = {"model.preserve_prompt_tokens": 0.1}
    layer_6 = {"model.layers": [6]}
    published = {**layer_6, "model.keys": "mean", "model.preserve_prompt_tokens": 0, METHOD + "covariance_weight": 1}
    equality = {**published, METHOD + "gamma": 0}
    current = {"model.values.reference": "current"}
    rome = {**published, "model.method": "ROME", "data.batch_size": 1}
    memit = {"model.method": "MEMIT", METHOD + "covariance_weight": 15000}
    nothing = {METHOD + "covariance_weight": 1e12}  # the closed form moves no weight that one would notice
    alphaedit = {"model.method": "AlphaEdit", "model.preserve_prompt_tokens": 0}
    return [
        Case("emmet", {}, [curve]),
        Case("both", {}, [both, curve]),
        Case("layer_6", layer_6, [curve]),
        Case("equality", equality, [curve]),
        Case("equality_current", {**equality, **current}, [curve]),
        Case("rome", rome, [curve]),
        Case("consolidated", {}, [consolidated, curve]),
        Case("consolidated_looser", looser, [consolidated, curve]),
        Case("consolidated_looser_lora", looser, [consolidated, thorough(edits), curve]),
        Case("replay", {}, [replay, curve]),
        Case("lora", {}, [lora, curve]),
        Case("both_lora", {}, [both, lora, curve]),
        Case("trust", {}, [trust, curve]),
        Case("memit", memit, [curve]),
        Case("alphaedit", alphaedit, [consolidated, curve]),
        Case("lora_alone", {"data.batch_size": edits, **nothing}, [thorough(edits)]),
        Case("joint", {"data.batch_size": edits}, []),
        Case("joint_looser", {"data.batch_size": edits, **looser}, []),
        Case("layer_6_consolidated", layer_6, [consolidated, curve]),
        Case("both_wider", {"model.layers": [1, 2, 3, 4, 5, 6]}, [both, curve]),
        Case("both_firmer", {METHOD + "covariance_weight": 2000}, [both, curve]),
        Case("both_softer", {METHOD + "covariance_weight": 500}, [both, curve]),
        Case("emmet_5000", {"data.limit": 5000}, [curve]),
        Case("consolidated_looser_5000", {**looser, "data.limit": 5000}, [consolidated, curve]),
    ]


def main() -> None:
    """Runs what is missing; writes the tables and the figure."""
    EXPERIMENT.main(__doc__, cases, edits=2000)


if __name__ == "__main__":
    main()
