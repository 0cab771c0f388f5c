"""All experiments of a project in one go, and all figures that are drawn from tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from editlab.experiments.drawing import draw_from_table
from editlab.experiments.figure_spec import RunsFigureSpec
from editlab.experiments.launch import LAUNCHERS, sigterm_as_exit
from editlab.experiments.provenance import cores
from editlab.experiments.spec import load_experiment
from editlab.runs.figures import save_figure

FIGURES = "figures"
"""Name of the last step, which draws the figures."""

ORDER = (
    "baselines", "slack_dial", "replay_ablation", "lora_ablation", "trust_eval", "trust_labels", "trust_graded",
    "trust_budget", "targets", "tuning", "forgetting", "controls", "preferred_counterfact", "known_builtin",
    "known_counterfact", "zsre", "gemma", "bridge", "batch_experiments",
)  # fmt: skip
"""Experiments that come first, in this order; others follow by name."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: tuple[str, ...]
    tables: tuple[str, ...] = ()
    """files of ``results/`` that it writes"""


def experiment_files(project: Path) -> list[Path]:
    """The project's experiments, in the order in which they are run."""
    order = {name: index for index, name in enumerate(ORDER)}
    files = (project / "configs" / "experiments").glob("*.yaml")
    return sorted(files, key=lambda file: (order.get(file.stem, len(order)), file.stem))


def parse(project: Path, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of :func:`reproduce`."""
    names = [file.stem for file in experiment_files(project)]
    parser = argparse.ArgumentParser(prog="reproduce_all.py", description="Runs every experiment, and draws figures.")
    parser.add_argument("--quick", action="store_true", help="a few small runs each, to see that every step works")
    parser.add_argument("--only", nargs="+", choices=[*names, FIGURES], help="steps; default: all")
    parser.add_argument("--out", type=Path, help="folder that results/ and figs/ are written to")
    parser.add_argument("--workers", type=int, help="runs at a time; default: 1, and with --quick 2")
    parser.add_argument("--launcher", choices=list(LAUNCHERS), default="local", help="ray: on a Ray cluster")
    parser.add_argument("--path", help="file of facts; default: that of each experiment")
    parser.add_argument("--heldout", help="text of the perplexity, likewise")
    parser.add_argument("--moments", help="text of the second moments, likewise")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and how long it takes")
    options = parser.parse_args(arguments)
    usual = project / "lightning_logs" / "quick" if options.quick else project
    options.out = (options.out or usual).absolute()
    options.workers = options.workers or (min(2, cores()) if options.quick else 1)
    return options


def steps(project: Path, options: argparse.Namespace) -> list[Step]:
    """The commands of all steps that are asked for."""
    shared = ["--out", str(options.out), "--workers", str(options.workers), "--launcher", options.launcher]
    shared += [flag for flag, given in (("--quick", options.quick), ("--dry-run", options.dry_run)) if given]
    for name in ("path", "heldout", "moments"):
        if getattr(options, name):
            shared += [f"--{name}", getattr(options, name)]
    found = [
        Step(
            file.stem,
            (sys.executable, "-m", "editlab.cli.main", "sweep", str(file), *shared),
            tuple(table.file for table in load_experiment(file).tables),
        )
        for file in experiment_files(project)
    ]
    if not options.dry_run:
        script = str(project / "scripts" / "analyze_results.py")
        found.append(Step(FIGURES, (sys.executable, script, "--out", str(options.out))))
    return [step for step in found if not options.only or step.name in options.only]


def carry_out(step: Step, options: argparse.Namespace) -> str:
    """Runs a step; returns ``passed``, or why it did not. An interrupt stops the step, and with it its runs."""
    with sigterm_as_exit(), subprocess.Popen(step.command) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code:
        return f"failed with exit code {code}"
    absent = [] if options.dry_run else [t for t in step.tables if not (options.out / "results" / t).exists()]
    return f"failed: it wrote no results/{absent[0]}" if absent else "passed"


def run_steps(some: Sequence[Step], options: argparse.Namespace) -> int:
    """Runs all steps, also after one that failed, and prints a table of them; returns the exit code."""
    rows = []
    for step in some:
        _print(f"\n== {step.name}: {' '.join(step.command[1:])}")
        start = time.perf_counter()
        rows.append((step.name, carry_out(step, options), time.perf_counter() - start))
    width = max([4, *(len(name) for name, *_ in rows)])
    _print(f"\n{'step':{width}} {'minutes':>8}  result")
    for name, result, seconds in rows:
        _print(f"{name:{width}} {seconds / 60:8.1f}  {result}")
    _print(f"{'all':{width}} {sum(s for *_, s in rows) / 60:8.1f}  tables and figures are in {options.out}")
    return int(any(result != "passed" for _, result, _ in rows))


def reproduce(project: Path, arguments: Sequence[str]) -> int:
    """Runs every experiment of a project, and draws the figures.

    Args:
        project: folder with ``configs/experiments/`` and ``scripts/``.
        arguments: of the command line.

    Returns:
        The exit code: 1 if a step failed.
    """
    options = parse(project, arguments)
    return run_steps(steps(project, options), options)


def draw_figures(project: Path, arguments: Sequence[str]) -> int:
    """Draws the figures of all experiments from their tables, and prints a line for each; returns the exit code 0.

    Args:
        project: folder with ``configs/experiments/``.
        arguments: of the command line.
    """
    experiments = [load_experiment(file) for file in experiment_files(project)]
    specs = [
        (spec, experiment)
        for experiment in experiments
        for spec in experiment.figures
        if not isinstance(spec, RunsFigureSpec)
    ]
    names = [spec.file for spec, _ in specs]
    parser = argparse.ArgumentParser(prog="analyze_results.py", description="Draws figures from the tables.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="figures; default: all")
    parser.add_argument("--out", type=Path, default=project, help="folder that results/ and figs/ lie in")
    options = parser.parse_args(arguments)
    for spec, experiment in specs:
        if spec.file not in options.only:
            continue
        figure = draw_from_table(spec, options.out)
        if isinstance(figure, Figure):
            save_figure(figure, options.out / "figs" / f"{spec.file}.png")
            _print(f"{spec.file}: figs/{spec.file}.png and .pdf, from results/{spec.table}")
        else:
            file = experiment.path.relative_to(project)
            _print(f"{spec.file}: skipped, as {figure} (editlab sweep {file} makes it)")
    return 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
