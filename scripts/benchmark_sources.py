"""Facts edited a second by each value source, in turn, and what the edits are worth.

    python scripts/benchmark_sources.py time       # on a quiet machine: the cases in turn, two rounds of 32 facts
    python scripts/benchmark_sources.py quality    # 64 facts of the dev split in batches of 16, each case by itself

Time is that of finding the targets and solving, with the unedited weights at the start of each round; keys are part of
it, evaluation is not. The processor's time is given too: on a busy machine it is the better measure. Each command
writes a row for each case into ``results/value_sources.csv``, and keeps the rows of the other.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import torch

from editlab import edit_model
from editlab.data import Fact
from editlab.data.files import read_facts
from editlab.edits.batch import BatchSolver
from editlab.edits.edited_layer import unedited
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.csv_files import Row, kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.moments import MomentSettings
from editlab.lm.language_model import LanguageModel
from editlab.lm.loading.load import load
from editlab.solver.methods import MEMIT, Method, UltraEdit
from editlab.values.settings import GRADIENT, ValueSettings
from editlab.values.sources import make_source
from editlab.values.spread import Targets, distinct

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "value_sources.csv"
METRICS = ("ES", "accuracy", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy", "perplexity", "generation")


@dataclass(frozen=True)
class Case:
    """A value source with the layers and the method that it is used with."""

    values: ValueSettings
    method: Method
    layers: list[int] = field(default_factory=lambda: [4, 5, 6])
    subject: str = "field"
    context_keys: float = 0.0

    @property
    def described(self) -> Row:
        """The settings, as columns."""
        return {
            "source": self.values.source, "method": type(self.method).__name__, "subject": self.subject,
            "layers": " ".join(map(str, self.layers)), "lr": self.values.step_size,
        }  # fmt: skip


CASES = {
    "optimize": Case(ValueSettings(reference="original"), MEMIT(300.0), context_keys=1.0),
    "gradient": Case(ValueSettings(source=GRADIENT), UltraEdit(), [23], "last_token"),
    "gradient_same_layers": Case(ValueSettings(source=GRADIENT), UltraEdit()),
}
"""The first two are configs/memit.yaml and configs/ultraedit.yaml; the third has the first one's layers."""


class Timed:
    """A case whose rounds are timed; values are searched for each time, and not read from the cache.

    Args:
        lm: the model.
        case: the case.
        contexts: prefixes of the search.
        name: the model's name.
    """

    def __init__(self, lm: LanguageModel, case: Case, contexts: Sequence[str], name: str) -> None:
        self.solver = BatchSolver.at(
            lm, case.layers, contexts, SolveSettings(case.method, context_key_weight=case.context_keys)
        )
        self.solver.read_moments(MomentSettings(), name)
        self.edited = list(self.solver.layers.values())
        anew = replace(case.values, reference="current")
        self.source = make_source(lm, "", contexts, anew, lambda: unedited(self.edited), lambda: 0, lambda count: [])

    def seconds(self, facts: Sequence[Fact]) -> tuple[float, float]:
        """Seconds by the clock and of the processor to edit facts in one batch; afterwards no edit is left."""
        start, processor = time.perf_counter(), time.process_time()
        (site,) = distinct(self.solver.sites)
        targets = Targets(facts, {site.layer: self.source.find(facts, site)})
        outcome = EditOutcome(EditPlan(0, facts, targets))
        self.solver.solve(outcome)
        taken = time.perf_counter() - start, time.process_time() - processor
        for layer in self.edited:
            layer.restore(torch.zeros_like(layer.total))
        return taken


def facts_of(case: Case, count: int) -> list[Fact]:
    """Built-in facts of the dev split, with the case's subjects."""
    return [fact for fact in read_facts("worldfacts", subject=case.subject) if fact.side == "dev"][:count]


def timed(name: str, rounds: int, batch_size: int) -> dict[str, Row]:
    """Facts a second of each case: the cases in turn, each round on further facts, after one small round for warmth."""
    lm = LanguageModel.from_name(name, torch.float32)
    contexts = sample_contexts(lm, ContextSettings())
    cases = {key: Timed(lm, case, contexts, name) for key, case in CASES.items()}
    facts = {key: facts_of(case, 2 + rounds * batch_size) for key, case in CASES.items()}
    for key, case in cases.items():
        case.seconds(facts[key][:2])
    print("The cases are timed.", flush=True)
    taken: dict[str, list[tuple[float, float]]] = {key: [] for key in cases}
    for start in range(2, 2 + rounds * batch_size, batch_size):
        for key, case in cases.items():
            taken[key].append(case.seconds(facts[key][start : start + batch_size]))
    first = taken["optimize"]
    return {
        key: {
            "facts_a_second": round(batch_size / mean(clock for clock, _ in own), 2),
            "times_optimize": round(median(a[0] / b[0] for a, b in zip(first, own, strict=True)), 1),
            "facts_a_processor_second": round(batch_size / mean(processor for _, processor in own), 2),
            "times_optimize_by_processor": round(median(a[1] / b[1] for a, b in zip(first, own, strict=True)), 1),
            "facts": rounds * batch_size, "batch_size": batch_size, "threads": torch.get_num_threads(),
        }
        for key, own in taken.items()
    }  # fmt: skip


def measured(name: str, cases: Sequence[str], count: int, batch_size: int) -> dict[str, Row]:
    """Retained scores of each case after editing the facts in sequence, and the unedited model's."""
    model, tokenizer = load(name, torch.float32)
    evaluation = EvaluationSettings(generated_texts=0, bystanders=0, immediate="edits")
    rows: dict[str, Row] = {}
    for key in cases:
        case = CASES[key]
        _, result = edit_model(
            model, tokenizer, facts_of(case, count), progress=False, layers=case.layers, batch_size=batch_size,
            method=case.method, values=case.values, preserve_prompt_tokens=case.context_keys, evaluation=evaluation,
        )  # fmt: skip
        scores = {n: f"{result.retained[n]:.3f}" for n in METRICS if n in result.retained}
        before = {f"{n}_before": f"{result.before[n]:.3f}" for n in METRICS if n in result.before}
        rows[key] = {"facts": count, "batch_size": batch_size, **scores, **before}
        result.revert()
    return rows


def main() -> None:
    """Measures time or quality, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of quality")
    parser.add_argument("--facts", type=int, default=64, help="of quality")
    parser.add_argument("--batch_size", type=int, help="default: 32 to time, 16 for quality")
    parser.add_argument("--rounds", type=int, default=2, help="of time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = (
        timed(given.model, given.rounds, given.batch_size or 32)
        if given.what == "time"
        else measured(given.model, given.cases, given.facts, given.batch_size or 16)
    )
    earlier = kept_rows(read_rows(given.results)) if given.results.exists() else []
    rows = [row for row in earlier if row["measured"] != given.what or row["case"] not in found]
    for key, row in found.items():
        settings = {"case": key, "measured": given.what, **CASES[key].described, "model": given.model}
        rows.append(settings | row | made_here(ROOT, settings) | {"date": datetime.date.today().isoformat()})
        print(rows[-1], flush=True)
    write_rows(rows, given.results)


if __name__ == "__main__":
    main()
