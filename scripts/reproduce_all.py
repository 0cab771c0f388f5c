"""Every experiment in one go, and the figures; goes on where it stopped, and ends with a table of what passed.

    python scripts/reproduce_all.py --quick             # built-in facts, few edits, one seed; to lightning_logs/quick
    python scripts/reproduce_all.py --dry-run           # what would be run, and how long it will take
    python scripts/reproduce_all.py --workers 2         # all of it: days on two cores
    python scripts/reproduce_all.py --only replay figures

Runs, tables and figures of the quick pass lie in a folder of their own. The exit code is 1 where a step failed; the
others are run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import LAUNCHERS, ROOT, cores, told_to_stop

QUICK_OUT = ROOT / "lightning_logs" / "quick"
QUICK = ("--path", "worldfacts", "--heldout", "builtin", "--moments", "self", "--tokens", "4096", "--seeds", "1",
         "--callback", "LoRAAdjust.steps=4", "--set", "model.evaluation.heldout_tokens=512")  # fmt: skip
"""Of each experiment in the quick pass, beside its own."""


@dataclass(frozen=True)
class Step:
    """One script."""

    name: str
    script: str
    tables: tuple[str, ...]
    """of ``results/``, which it writes"""
    quick: tuple[str, ...]
    """arguments in the quick pass"""
    sweep: bool = True
    """whether it takes the arguments of ``sweep.py``"""


FEW = ("--edits", "16", "--batch_size", "4")
STEPS = (
    Step("baselines", "run_all_baselines.py", ("baseline_comparison.csv", "quick_validation.csv"),
         ("--edits", "16", "--only",
          "rome_sequential", "emmet_sequential", "alphaedit_sequential", "emmet_independent")),
    Step("replay", "run_replay_ablation.py",
         ("replay_ablation.csv", "replay_ablation_means.csv", "replay_ablation_curves.csv"),
         (*FEW, "--only", "none", "random_0.3_200", "both", "joint")),
    Step("lora", "run_lora_ablation.py",
         ("lora_ablation.csv", "lora_ablation_means.csv", "lora_ablation_curves.csv"),
         (*FEW, "--only", "emmet", "lora_8")),
    Step("trust", "run_trust_eval.py", ("trust_eval.csv", "trust_roc.csv", "trust_effect.csv", "trust_events.jsonl"),
         ("--edits", "20", "--batch_size", "2", "--only", "faulty_gate", "faulty", "clean_gate")),
    Step("forgetting", "run_forgetting.py",
         ("large_scale_forgetting.csv", "large_scale_final.csv", "large_scale_means.csv", "large_scale_turns.csv"),
         (*FEW, "--only", "emmet", "both")),
    Step("matrix", "run_batch_experiments.py", ("ablation_matrix.csv",),
         ("--edits", "16", "--only", "batch_1_rate_0_lora_none", "batch_8_rate_0_lora_none",
          "batch_8_rate_0.3_lora_none", "batch_8_rate_0.3_lora_8")),
    Step("figures", "analyze_results.py", (), (), sweep=False),
)  # fmt: skip


def command(step: Step, options: argparse.Namespace) -> list[str]:
    """What a step is called with."""
    found = [sys.executable, str(ROOT / "scripts" / step.script), "--out", str(options.out)]
    if not step.sweep:
        return found
    found += ["--workers", str(options.workers), "--launcher", options.launcher]
    if options.quick:
        found += ["--work", str(options.out / "runs" / step.name), *QUICK, *step.quick]
    for name in ("path", "heldout", "moments"):
        if getattr(options, name):
            found += [f"--{name}", getattr(options, name)]
    return found + (["--dry-run"] if options.dry_run else [])


def carry_out(step: Step, options: argparse.Namespace) -> str:
    """Runs a step; returns ``passed``, or why it did not. What stops this stops the step, and with it its runs."""
    with told_to_stop(), subprocess.Popen(command(step, options)) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code:
        return f"failed with exit code {code}"
    absent = [] if options.dry_run else [t for t in step.tables if not (options.out / "results" / t).exists()]
    return f"failed: it wrote no results/{absent[0]}" if absent else "passed"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a pass of minutes: that every step works, not its numbers"
    )
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="steps")
    parser.add_argument("--out", type=Path, help="folder whose results/ and figs/ are written to")
    parser.add_argument("--workers", type=int, help="runs at a time; 1 if not given, in the quick pass two")
    parser.add_argument(
        "--launcher", choices=list(LAUNCHERS), default="local", help="ray: over the machines of a cluster"
    )
    parser.add_argument("--path", help="fact file, if not that of each experiment")
    parser.add_argument("--heldout", help="text of the perplexity, likewise")
    parser.add_argument("--moments", help="text of the second moments, likewise")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and how long it will take")
    found = parser.parse_args(arguments)
    found.out = (found.out or (QUICK_OUT if found.quick else ROOT)).absolute()
    found.workers = found.workers or (min(2, cores()) if found.quick else 1)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the steps, prints the table, and exits with 1 where one failed."""
    options = parse(arguments)
    rows = []
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        if options.dry_run and not step.sweep:
            continue
        print(f"\n== {step.name}: scripts/{step.script}", flush=True)
        start = time.perf_counter()
        rows.append((step.name, carry_out(step, options), time.perf_counter() - start))
    print(f"\n{'step':12} {'minutes':>8}  result")
    for name, result, seconds in rows:
        print(f"{name:12} {seconds / 60:8.1f}  {result}")
    print(f"{'all':12} {sum(seconds for *_, seconds in rows) / 60:8.1f}  tables and figures in {options.out}")
    if any(result != "passed" for _, result, _ in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
