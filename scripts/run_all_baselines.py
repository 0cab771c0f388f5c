"""ROME, MEMIT, EMMET and AlphaEdit on the same 200 facts: in sequence, and each batch on the original weights.

    python scripts/run_all_baselines.py                    # every method both ways; goes on where it stopped
    python scripts/run_all_baselines.py --only rome_sequential emmet_sequential
    python scripts/run_all_baselines.py --dry-run

Writes ``results/baseline_comparison.csv`` (a row a run) and ``results/quick_validation.csv`` (the runs in sequence).
Methods are comparable at equal effective weight (slack times lambda), which the tables give.
"""

from __future__ import annotations

from typing import Any

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
from tables import table_rows, update_table, write_rows

RECIPE = "configs/emmet.yaml"
METHOD = "model.method.init_args."
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "emmet": ("EMMET", 32, {METHOD + "covariance_weight": 1, METHOD + "gamma": 0}),
    "rome": ("ROME", 1, {}),
    "memit": ("MEMIT", 32, {METHOD + "covariance_weight": 15000}),
    "memit_300": ("MEMIT", 32, {METHOD + "covariance_weight": 300}),
    "emmet_300": ("EMMET", 32, {METHOD + "covariance_weight": 300, METHOD + "gamma": 1}),
    "alphaedit": ("AlphaEdit", 32, {}),
}
"""name -> method, batch size, settings; ``memit`` has the published weight, ``emmet_300`` is ``memit_300`` by theory.
Not ROME first: values of the original weights are found faster for a batch at a time, and then it reads them."""


def cases() -> list[Case]:
    """Each method in sequence, and each batch on its own.

    One layer, keys of the bare prompts, and values that may leave the origin by four times its norm, as in the
    reference codes. In sequence, values are found on the weights as they are, as published; on the original weights
    that is the same as finding them there, once for all methods.
    """
    one_layer = {"model.layers": [6], "model.keys": "bare", "model.values.clamp": 4, "model.preserve_prompt_tokens": 0}
    found = []
    for name, (method, batch, settings) in METHODS.items():
        past_keys = [{"class_path": "MemoryReplay", "init_args": {"memory": "consolidated"}}]
        for way, reference in (("sequential", "current"), ("independent", "original")):
            alone = way == "independent"
            flags = {**one_layer, "model.method": method, **settings, "data.batch_size": batch,
                     "model.values.reference": reference, "model.restore_between_batches": alone}  # fmt: skip
            callbacks = past_keys if method == "AlphaEdit" and not alone else []
            labels = {"method": method, "way": way, "batch_size": batch}
            found.append(Case(f"{name}_{way}", flags, callbacks, labels))
    return found


def measured(run: Run) -> dict[str, Any]:
    """What the comparison needs beside the metrics: the effective weight, time and memory."""
    summary = run.summary or {}
    norms = list(summary["delta_norm"].values())
    weights = [v for row in run.curve().values() for k, v in row.items() if k.endswith("/effective_weight")]
    return {
        "effective_weight": round(weights[-1], 4) if weights else "",
        "delta_norm": round(max(norms), 4) if None not in norms else "",
        "seconds_an_edit": round(summary["seconds"] / max(1, summary["edits"]), 3),
        "peak_memory_mb": round(summary["peak_memory_mb"]),
    }


@in_a_sentence
def main() -> None:
    """Runs what is missing; writes the tables."""
    shared = parser(__doc__, work=ROOT / "lightning_logs" / "baselines", edits=200, seeds=[1])
    add_texts(shared)
    options = shared.parse_args()
    common = {**common_flags(options), "model.evaluation.immediate": "all"}
    wanted = [case.over(common) for case in cases()]
    runs = planned(wanted, RECIPE, options)
    done = run_all(runs, options, at_hand(wanted, RECIPE, options))
    if done:
        results = options.out / "results"
        names = [case.name for case in wanted]
        rows = update_table(results / "baseline_comparison.csv", table_rows(done, measured), names)
        sequential = [row for row in rows if row["way"] == "sequential"]
        if sequential:
            write_rows(sequential, results / "quick_validation.csv")
    exit_where_failed(runs, options)


if __name__ == "__main__":
    main()
