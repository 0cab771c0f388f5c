"""Measures what ES, accuracy and one perplexity miss: answers of an edited model, and perplexities of blocks of texts.

Edits built-in facts in the built-in model by MEMIT, softly, and lets the model answer freely. Writes
results/what_the_metrics_miss.csv, a row for each prompt, and results/block_perplexities.csv, a row for each text.
docs/what-the-metrics-miss.md is written from them. On one core it takes some ten minutes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from editlab import edit_model
from editlab.data.files import read_facts
from editlab.evaluation.language import BUILTIN_TEXT, block_perplexities
from editlab.evaluation.scoring import prefers_truth, score_pairs
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.csv_files import write_rows
from editlab.experiments.provenance import made_here
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import read_file
from editlab.solver.methods import MEMIT
from editlab.values.settings import ValueSettings

PROJECT = Path(__file__).parents[1]


def main() -> None:
    """Measure, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("answers", "blocks", []), help="tables to make; default: both")
    parser.add_argument("--facts", type=int, default=32, help="number of facts to edit")
    parser.add_argument("--weight", type=float, default=5000.0, help="weight of C0: the larger, the softer the edits")
    parser.add_argument("--texts", nargs="*", default=["../shared/data/text/wikitext2_test.txt"], help="further texts")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a block; the built-in text has less")
    parser.add_argument("--out", type=Path, default=PROJECT / "results")
    given = parser.parse_args()
    lm = LanguageModel.from_name("smollm2-135m", torch.float32)
    made = made_here(PROJECT, {name: value for name, value in vars(given).items() if name not in ("what", "out")})
    if given.what in ([], ["answers"]):
        rows = answers(lm, given.facts, given.weight)
        write_rows([{**row, **made} for row in rows], given.out / "what_the_metrics_miss.csv")
    if given.what == ["answers"]:
        return
    blocks = []
    for path, tokens in ((str(BUILTIN_TEXT), given.tokens // 8), *((text, given.tokens) for text in given.texts)):
        found = block_perplexities(lm, read_file(path), 8, tokens)
        numbered = {f"block_{number}": round(value, 2) for number, value in enumerate(found, 1)}
        blocks.append({"text": Path(path).name, "tokens": tokens, **numbered, **made})
    write_rows(blocks, given.out / "block_perplexities.csv")


def answers(lm: LanguageModel, count: int, weight: float) -> list[dict[str, Any]]:
    """Edit facts whose truth the model prefers; a row for each free answer, with the scores of the same prompt."""
    facts = read_facts("worldfacts")
    random.Random(0).shuffle(facts)
    facts = [fact for fact, kept in zip(facts, prefers_truth(lm, facts[: 2 * count]), strict=False) if kept][:count]
    model, tokenizer = lm.model, lm.tokenizer
    _, result = edit_model(
        model,
        tokenizer,
        facts,
        layers=[4, 5, 6],
        method=MEMIT(covariance_weight=weight),
        preserve_prompt_tokens=1.0,
        values=ValueSettings(reference="original"),
        evaluation=EvaluationSettings(generation="all", heldout_tokens=0, bystanders=0),
    )
    rows = []
    for one in result.editor.evaluation.generated["retained"]:
        fact = result.facts[one.index]
        truth = next(n.truth for n in fact.neighbors) if one.kind == "neighbor" else str(fact.target_true)
        logps, hits = score_pairs(result.editor.lm, [(one.prompt, fact.target_new), (one.prompt, truth)])
        rows.append({
            "weight": weight, "fact": fact.subject, "kind": one.kind, "prompt": one.prompt,
            "target": fact.target_new, "truth": truth,
            "prefers_target": int(logps[0] > logps[1]), "argmax_is_target": int(hits[0]),
            "argmax_is_truth": int(hits[1]), "answer": one.text, "contains": int(one.contains),
            "exact": int(one.exact), "f1": round(one.f1, 3),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
