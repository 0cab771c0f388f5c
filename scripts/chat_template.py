"""What a chat template changes: the same facts edited and scored at plain prompts and at chat prompts.

    python scripts/chat_template.py          # SmolLM2-135M-Instruct, 32 built-in facts, a run for each mode

The table gives the scores of each run's own mode, and the fraction of facts for which the model's own greedy answer, up
to the end of its first sentence, has the new target in it: after the plain prompt and after the chat prompt.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import torch

from editlab import edit_model
from editlab.data import Fact
from editlab.data.files import read_facts
from editlab.evaluation.evaluator import EvaluationSettings
from editlab.evaluation.known import normalized
from editlab.experiments.csv_files import Row, kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.lm.chat import MODES, NONE, Chat
from editlab.lm.generate import greedy_continuations
from editlab.lm.language_model import LanguageModel
from editlab.lm.loading.load import load

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("ES", "accuracy", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy", "perplexity")


def says(lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str]) -> str:
    """Fraction of prompts after which the model's first sentence has the answer in it, as text."""
    found = [
        f" {normalized(answer)} " in f" {normalized(text)} "
        for text, answer in zip(greedy_continuations(lm, prompts), answers, strict=True)
    ]
    return f"{sum(found) / len(found):.3f}"


def main() -> None:
    """Makes a run for each mode, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chat_template.csv")
    given = parser.parse_args()
    where = {**made_here(ROOT, {"facts": given.facts}), "date": datetime.date.today().isoformat()}
    model, tokenizer = load(given.model, torch.float32)
    facts: list[Fact] = read_facts("worldfacts")[: given.facts]
    plain = [fact.question for fact in facts]
    chat = Chat.of(tokenizer, "both")
    assert chat is not None
    places = {"plain": plain, "chat": list(map(chat.wrap, plain))}
    truths, new = [str(fact.target_true) for fact in facts], [fact.target_new for fact in facts]
    lm = LanguageModel(model, tokenizer)
    before = {f"says_truth_before_{name}": says(lm, prompts, truths) for name, prompts in places.items()}
    earlier = kept_rows(read_rows(given.out)) if given.out.exists() else []
    rows: list[Row] = [row for row in earlier if row["chat_template"] not in given.modes]
    for mode in given.modes:
        evaluation = EvaluationSettings(generated_texts=0)
        _, result = edit_model(model, tokenizer, facts, progress=False, chat_template=mode, evaluation=evaluation)
        row = {"chat_template": mode, "facts": len(facts)}
        row |= {f"{name}_before": f"{result.before[name]:.3f}" for name in METRICS}
        row |= {name: f"{result.retained[name]:.3f}" for name in METRICS}
        row |= before if mode == NONE else {}
        row |= {f"says_new_{name}": says(lm, prompts, new) for name, prompts in places.items()}
        rows.append(row | {"model": given.model, "threads": torch.get_num_threads(), **where})
        print(rows[-1], flush=True)
        result.revert()
        write_rows(rows, given.out)


if __name__ == "__main__":
    main()
