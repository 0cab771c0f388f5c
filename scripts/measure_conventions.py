"""What each convention of the published codes does to the same edits (editlab.edits.conventions).

    python scripts/measure_conventions.py                    # all cases: about 20 minutes on one free core
    python scripts/measure_conventions.py --only memit_own memit_published

Edits built-in facts in sequence in SmolLM2-135M, with values of the original weights, by MEMIT and AlphaEdit (layers 4
to 6, batches of 20) and by ROME (layer 6, one fact a step). Differences of a case from its method's ``own`` are paired
over the facts. Scores are computed with bfloat16 products, of two neighbors a fact. Rows of other cases in the table
stay as they are; values are kept in the cache folder, so that a killed measurement resumes with the case it was in.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from callbacks import MemoryReplay
from editlab import edit_model
from editlab.data import Fact
from editlab.data.files import read_facts
from editlab.editor import SequentialEditor
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.csv_files import Row, kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.experiments.statistics import paired_bootstrap
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.lm.language_model import LanguageModel
from editlab.lm.loading.load import load
from editlab.metrics.names import BEFORE, RETAINED
from editlab.runs.outcomes import outcome_rows, outcome_values
from editlab.solver.methods import MEMIT, ROME, AlphaEdit
from editlab.utils.progress import bars
from editlab.values.cache import ValueCache
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = {"kl_at": "subject"}
_MEMIT = {"method": MEMIT(covariance_weight=300.0), "preserve_prompt_tokens": 1.0}
_ROME = {"method": ROME(), "preserve_prompt_tokens": 0.0, "layers": [6], "batch_size": 1}
_PAPER = {"conventions": "published"}

CASES: dict[str, dict[str, Any]] = {
    "memit_own": _MEMIT,
    "memit_kl_subject": _MEMIT | SUBJECT,
    "memit_templates": _MEMIT | {"keys": "templates"},
    "memit_mean": _MEMIT | {"keys": "mean"},
    "memit_published": _MEMIT | _PAPER,
    "alphaedit_own": {"method": AlphaEdit(l2=1.0)},
    "alphaedit_l2_10": {"method": AlphaEdit(l2=10.0)},
    "alphaedit_published": {"method": AlphaEdit(l2=1.0)} | _PAPER,
    "alphaedit_published_l2_10": {"method": AlphaEdit(l2=10.0)} | _PAPER,
    "rome_own": _ROME,
    "rome_kl_subject": _ROME | SUBJECT,
    "rome_mean": _ROME | {"keys": "mean"},
    "rome_mlp": _ROME | {"site": "mlp"},
    "rome_one_key": _ROME | {"keys": "mean", "site": "mlp"} | SUBJECT,
    "rome_published": _ROME | _PAPER,
    "rome_published_clamp_4": _ROME | _PAPER | {"clamp": 4.0},
}
"""Case -> arguments of :func:`editlab.edit_model`, and ``kl_at`` and ``clamp`` of the values.

``rome_one_key`` has every published convention but the denominator, which is the mean key's as in r-ROME.
``rome_published_clamp_4`` has the ball of the authors' settings too."""

METRICS = ("ES", "accuracy", "PS", "paraphrase_accuracy", "NS")


def find_values(editor: SequentialEditor, facts: Sequence[Fact], size: int) -> None:
    """Fills the cache with the facts' values in groups, which is faster than one fact at a time, as ROME asks for."""
    lm = editor.lm
    contexts = sample_contexts(lm, ContextSettings())
    cache = ValueCache.of(lm, editor.model_key, editor.site, contexts, editor.values)
    for start in range(0, len(facts), size):
        cache.fetch(
            facts[start : start + size],
            lambda some: optimize_values(lm, some, editor.site, contexts, editor.values).target,
        )


def measure(name: str, model: Any, tokenizer: Any, facts: Sequence[Fact], size: int) -> tuple[Row, Mapping[str, Any]]:
    """Edits the facts as a case says: its metrics, and metric -> fact -> value. The model is as before afterwards."""
    settings = {"layers": [4, 5, 6], "batch_size": size, **CASES[name]}
    changed = {part: settings.pop(part) for part in ("kl_at", "clamp") if part in settings}
    values = ValueSettings(reference="original", **changed)
    if settings["batch_size"] == 1:
        editing = {key: value for key, value in settings.items() if key != "batch_size"}
        editor = SequentialEditor(values=values, **editing)
        editor.use(LanguageModel(model, tokenizer))
        find_values(editor, facts, size)
    callbacks: list[Callback] = [MemoryReplay(memory="consolidated")] if name.startswith("alphaedit") else []
    evaluation = EvaluationSettings(
        immediate="edits",
        heldout_tokens=2048,
        generated_texts=0,
        generation=0,
        bystanders=0,
        neighbors=2,
        age_bins=0,
        matmul="auto",
    )
    given: dict[str, Any] = {"preserve_prompt_tokens": 0.0, **settings, "values": values}
    _, result = edit_model(
        model, tokenizer, facts, callbacks=callbacks, progress=False, seed=0, evaluation=evaluation, **given
    )
    rows = outcome_rows(result.editor.ledger, {RETAINED: result.editor.evaluation.scores(RETAINED)})
    each = {metric: outcome_values(rows, metric) for metric in METRICS}
    row: Row = {f"{metric}_{BEFORE}": f"{result.before[metric]:.4f}" for metric in ("PS", "NS")}
    row |= {metric: f"{result.retained[metric]:.4f}" for metric in METRICS}
    row["accuracy_immediate"] = f"{result.summary['metrics']['immediate/accuracy']:.4f}"
    row["perplexity_ratio"] = f"{result.retained['perplexity'] / result.before['perplexity']:.4f}"
    totals = [float(layer.total.norm() / layer.original.float().norm()) for layer in result.editor.layers]
    row["delta_norm"] = f"{sum(total**2 for total in totals) ** 0.5:.4f}"
    result.revert()
    return row, each


def differences(each: Mapping[str, Any], base: Mapping[str, Any]) -> Row:
    """Differences of the metrics from those of the base case, paired over facts, with 95% intervals."""
    row: Row = {}
    for metric in METRICS:
        found = paired_bootstrap({0: each[metric]}, {0: base[metric]})
        assert found is not None
        for part in ("difference", "low", "high"):
            row[f"{metric}_{part}"] = f"{getattr(found, part):.4f}"
    return row


def main() -> None:
    """Makes a run for each case, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=200, help="facts to edit by MEMIT and AlphaEdit")
    parser.add_argument("--rome-facts", type=int, default=50, help="facts to edit by ROME, the first of them")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "conventions.csv")
    given = parser.parse_args()
    model, tokenizer = load(given.model, torch.float32)
    facts: list[Fact] = read_facts("worldfacts")
    random.Random(0).shuffle(facts)
    bases: dict[str, Mapping[str, Any]] = {}
    for name in given.only:
        method = name.partition("_")[0]
        some = facts[: given.rome_facts if method == "rome" else given.facts]
        where = {**made_here(ROOT, {"facts": len(some), "case": name, **CASES[name]}), "model": given.model}
        with bars(False):
            if method not in bases and name != f"{method}_own":  # to be paired with
                bases[method] = measure(f"{method}_own", model, tokenizer, some, given.batch_size)[1]
            row, each = measure(name, model, tokenizer, some, given.batch_size)
        base = bases.setdefault(method, each)
        row = {"case": name, "facts": len(some), **row, **differences(each, base)}
        earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
        others = {str(one["case"]): one for one in earlier}
        others[name] = row | {"threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(), **where}
        write_rows([others[case] for case in CASES if case in others], given.out)
        print(datetime.datetime.now().isoformat(timespec="seconds"), others[name], flush=True)


if __name__ == "__main__":
    main()
