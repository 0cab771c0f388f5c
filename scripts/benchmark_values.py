"""Values v* the plain way and editlab's way on the same facts, in turn: the ratio of their times at equal loss.

    python scripts/benchmark_values.py --facts 32

The plain way (``tests/oracle.py``) is what the reference codes do: one fact at a time, the whole model on the whole
prompt, full logits. Both ways use the same contexts and hyper-parameters and take the same number of steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the oracle lives with the tests

from editlab.contexts import ContextSettings, sample_contexts
from editlab.data import EditDataModule
from editlab.keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.scoring import prefers_truth
from editlab.values import ValueSettings, optimize_values
from tests.oracle import naive_value


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that ``work()`` takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def profile(work: Callable[[], object]) -> list[tuple[str, float]]:
    """Shares of the time by kind of operation, the largest first."""
    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
        "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
        "log-softmax over the vocabulary": ("aten::_log_softmax", "aten::logsumexp", "aten::exp"),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    totals = dict.fromkeys([*kinds, "element-wise, copies, Python"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in kinds.items() if event.key.startswith(names)), "element-wise, copies, Python")
        totals[kind] += event.self_cpu_time_total
    whole = sum(totals.values())
    return sorted(((kind, t / whole) for kind, t in totals.items()), key=lambda pair: -pair[1])


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=32, help="facts, in groups of --group")
    parser.add_argument("--group", type=int, default=16, help="facts a turn: plain, ours, plain, ours, ...")
    parser.add_argument("--path", default="worldfacts", help="fact file")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--language_model", default="smollm2-135m")
    parser.add_argument("--matmul", default=ValueSettings.matmul, help="our products: auto, float32 or bfloat16")
    arguments = parser.parse_args()

    lm = LanguageModel.from_name(arguments.language_model, torch.float32)
    data = EditDataModule(arguments.path, limit=arguments.facts)
    data.setup()
    data.select(lambda facts: prefers_truth(lm, facts))
    contexts = sample_contexts(lm, ContextSettings())
    site, settings = Site.of(lm, arguments.layer), ValueSettings(matmul=arguments.matmul)
    optimize_values(lm, data.facts[:2], site, contexts, settings)  # warm-up

    ratios, losses, distances = [], [], []
    for start in range(0, len(data.facts), arguments.group):
        facts = data.facts[start : start + arguments.group]
        slow, plain = timed(lambda f=facts: [naive_value(lm, fact, site, contexts, settings) for fact in f])
        fast, ours = timed(lambda f=facts: optimize_values(lm, f, site, contexts, settings))
        ratios.append(slow / fast)
        losses += [(p[1], float(loss)) for p, loss in zip(plain, ours.loss, strict=True)]
        distances += [float((p[0] - v).norm() / p[0].norm()) for p, v in zip(plain, ours.target, strict=True)]
        print(
            f"{len(facts)} facts: plain {slow / len(facts):6.2f} s a fact, ours {fast / len(facts):5.2f} s, ratio "
            f"{ratios[-1]:5.2f}; steps {statistics.mean(p[2] for p in plain):.1f} and {ours.steps.float().mean():.1f}",
            flush=True,
        )
    slow_loss, fast_loss = (statistics.mean(column) for column in zip(*losses, strict=True))
    print(
        f"median ratio {statistics.median(ratios):.2f}; mean loss {slow_loss:.5f} and {fast_loss:.5f} "
        f"({fast_loss / slow_loss - 1:+.2%}); values differ by {statistics.median(distances):.1e} of their norm "
        f"(median); {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("where ours spends its time:")
    for kind, share in profile(lambda: optimize_values(lm, data.facts[:10], site, contexts, settings)):
        print(f"  {share:6.1%}  {kind}")


if __name__ == "__main__":
    main()
