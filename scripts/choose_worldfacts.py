"""Measure which candidates for the built-in facts the built-in model knows, and write ``worldfacts_known.tsv``.

    python scripts/make_worldfacts.py --candidates | python scripts/choose_worldfacts.py     # a few minutes
    python scripts/make_worldfacts.py

A prompt is known if the model's own greedy continuation begins with the truth (editlab.evaluation.known). All prompts
of the subjects that may be edited, and of those that may be neighbors, are measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from editlab.data.fact import Fact
from editlab.evaluation.known import knows_truth
from editlab.lm.language_model import LanguageModel
from editlab.utils.files import atomic_file
from editlab.utils.progress import progress

KNOWN = Path(__file__).with_name("worldfacts_known.tsv")


def main() -> None:
    """Measures the candidates on standard input and writes the file."""
    # The new target has no meaning here.
    facts = [Fact(subject, prompt, "-", truth) for subject, prompt, truth in json.load(sys.stdin)]
    lm = LanguageModel.from_name("smollm2-135m", torch.float32)
    with progress(total=len(facts), desc="Candidates", unit="prompt") as bar:
        known = knows_truth(lm, facts, bar.update)
    lines = {f"{fact.question}\t{fact.target_true}\n" for fact, held in zip(facts, known, strict=True) if held}
    with atomic_file(KNOWN) as temporary:
        temporary.write_text("".join(sorted(lines)), encoding="utf-8")
    print(f"{sum(known)} of {len(facts)} prompts are known")


if __name__ == "__main__":
    main()
