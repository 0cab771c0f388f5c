"""What the special tokens before a text do to a model: perplexity, and the second moments C0 of some layers.

    python scripts/measure_beginning.py gemma-3-270m-q4_k_m.gguf --layers 1 9

Reads the first tokens of the built-in held-out text three ways: as the tokenizer begins a text (``begun``), the same
with the special tokens' own keys counted in C0 (``counted``), and without special tokens (``bare``). Writes
``results/beginning.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from editlab.evaluation.language import BUILTIN_TEXT
from editlab.evaluation.scoring import token_log_probs
from editlab.experiments.csv_files import write_rows
from editlab.experiments.provenance import made_here
from editlab.keys.moments import accumulate
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import cut, read_file, read_ids

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "beginning.csv"


def main() -> None:
    """Measure, and write a row for each way of reading and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, folder or hub name of a model whose tokenizer begins texts")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 9])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    lm = LanguageModel.from_name(options.model, torch.float32)
    ids = read_ids(lm, read_file(str(BUILTIN_TEXT)), options.tokens)
    beginning, rows = lm.beginning, []
    for way, before in (("begun", beginning), ("counted", beginning), ("bare", ())):
        lm.beginning = before
        perplexity = float((-token_log_probs(lm, ids).mean()).exp())
        windows = cut(lm, ids)
        if way == "counted":
            lm.beginning = ()  # the windows keep their special tokens, whose keys now count
        for layer, moments in accumulate(lm, options.layers, windows).items():
            trace, largest = float(moments.trace()), float(torch.linalg.eigvalsh(moments)[-1])
            rows.append({"way": way, "layer": layer, "perplexity": round(perplexity, 2), "trace": round(trace, 2),
                         "largest_share": round(largest / trace, 4), "tokens": options.tokens,
                         "model": Path(options.model).name})  # fmt: skip
            print(rows[-1])
    made = made_here(ROOT, {name: value for name, value in vars(options).items() if name != "results"})
    write_rows([row | made for row in rows], options.results)


if __name__ == "__main__":
    main()
