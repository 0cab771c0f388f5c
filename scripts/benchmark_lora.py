"""Cost of a LoRA adjustment and of full fine-tuning of the same maps: parameters, peak memory, time a step.

    python scripts/benchmark_lora.py --rank 8 --layers 2 3 4 5 6

Each is trained in a process of its own, on the same rows, in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from callbacks.lora.objective import Objective, distributions, prompt_rows
from callbacks.lora.targets import find_targets
from callbacks.lora.training import Training
from editlab.data import EditDataModule
from editlab.lm.language_model import LanguageModel
from editlab.runs.summary import peak_memory_mb
from editlab.training.adapter import Adapter, parameters
from editlab.training.rows import edit_rows

KINDS = ("lora", "full")


@contextmanager
def trained(kind: str, lm: LanguageModel, paths: list[str], rank: int) -> Iterator[list[nn.Parameter]]:
    """The parameters that are trained: those of an adapter, or those of the maps themselves."""
    if kind == "lora":
        with Adapter(lm, paths, rank, 2.0 * rank, 0.0, seed=0).in_place() as model:
            yield parameters(model)
    else:
        yield [lm.model.get_submodule(path).weight.requires_grad_() for path in paths]  # type: ignore[misc]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains an adapter or the full maps in this process."""
    lm = LanguageModel.from_name(options.model, torch.float32)
    data = EditDataModule(keep="all", limit=64)
    data.setup()
    rows = edit_rows(lm, data.candidates[:64], [""])
    others = prompt_rows(lm, data.candidates[64:112])
    weights = {"edits": 1.0, "before": 1.0, "unedited": 0.0}
    objective = Objective(rows, others, distributions(lm, others), [], weights)
    paths = find_targets(lm.anatomy, options.targets, options.layers)
    with trained(options.kind, lm, paths, options.rank) as some:
        optimizer = torch.optim.AdamW(some, lr=1e-4)
        start = time.perf_counter()
        Training(options.steps, 1e-4, options.batch_size).run(lm, objective, optimizer, random.Random(0))
        seconds = (time.perf_counter() - start) / options.steps
    whole = sum(p.numel() for p in lm.model.parameters())
    count = sum(p.numel() for p in some)
    return {"parameters": count, "share": count / whole, "peak_mb": peak_memory_mb(), "seconds": seconds}


def main() -> None:
    """Trains each in a process of its own and compares their costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--targets", default="edited")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32, help="edit prompts in each step, and other prompts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options)))
        return
    for number in range(options.rounds):
        for kind in KINDS:
            command = [sys.executable, *sys.argv, "--kind", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            found = json.loads(output)
            print(
                f"round {number + 1}  {kind:5} {found['parameters']:>10,} trainable ({found['share']:.3%})  "
                f"peak {found['peak_mb']:.0f} MiB  {found['seconds']:.2f} s a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
