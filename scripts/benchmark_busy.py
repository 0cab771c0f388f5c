"""Time to compute values of a few facts while other processes are busy, by how OpenMP's threads wait.

    python scripts/benchmark_busy.py                              # SmolLM2-135M; about fifteen minutes on two cores
    python scripts/benchmark_busy.py --busy 0 1 --rounds 2 --settings torch editlab

The machine must be idle otherwise. For each number of busy processes, each setting gets a process of its own, which
loads the model while the others wait; then they compute the same values in turn (torch, editlab, torch, editlab, ...),
so that a machine that slows down slows all of them. Settings:

    torch     torch's defaults: as many threads as cores, which spin while they wait for each other
    passive   the same, with threads that sleep while they wait
    one       a single thread
    editlab   what the command ``editlab`` does: on a busy machine threads that sleep, no more than there are free cores

Appends to ``results/busy_machine.csv``: seconds a fact (median over rounds), how many times as long that is as torch's
defaults take on the idle machine, and whether the values have the same bits as those of torch's defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.utils.machine import THREAD_VARIABLES, WAIT_VARIABLES, LoadMeter, choose_threads, wait_passively_if_busy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "busy_machine.csv"
SETTINGS: dict[str, dict[str, str]] = {
    "torch": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one": {"OMP_NUM_THREADS": "1"},
    "editlab": {},
}
"""Environment variables of each setting; all others about threads are removed."""


# ---- the process that computes ------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Loads the model, then computes the values once for each line of standard input; answers in lines of JSON."""
    meter = LoadMeter()
    if options.worker == "editlab":
        wait_passively_if_busy(meter)
    import torch

    from editlab.data import EditDataModule
    from editlab.keys.subject_keys import Site
    from editlab.lm.language_model import LanguageModel
    from editlab.values.optimize import optimize_values
    from editlab.values.settings import ValueSettings

    lm = LanguageModel.from_name(options.language_model, torch.float32)
    if options.worker == "editlab":
        choose_threads(meter)
    data = EditDataModule(limit=options.facts, keep="all")
    data.setup()
    data.select(lambda facts: [True] * len(facts))
    site, settings = Site.of(lm, options.layer), ValueSettings(steps=options.steps)
    answer: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    sys.stdout.write(json.dumps(answer) + "\n")
    for _ in iter(sys.stdin.readline, ""):
        sys.stdout.flush()
        start = time.perf_counter()
        found = optimize_values(lm, data.facts, site, [""], settings).target
        seconds = (time.perf_counter() - start) / len(data.facts)
        digest = hashlib.sha256(found.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]
        sys.stdout.write(json.dumps({"seconds": seconds, "digest": digest}) + "\n")
        sys.stdout.flush()


class Worker:
    """A process that computes the values with one setting each time it is requested."""

    def __init__(self, setting: str, options: argparse.Namespace) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in (*WAIT_VARIABLES, *THREAD_VARIABLES)}
        command = [sys.executable, str(Path(__file__)), "--worker", setting]
        for name in ("facts", "steps", "layer", "language_model"):
            command += [f"--{name}", str(getattr(options, name))]
        self.process = subprocess.Popen(
            command, env=kept | SETTINGS[setting], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = {"threads": 0, "torch": ""}
        self.seconds: list[float] = []
        self.digest = ""

    def start(self) -> None:
        """Waits until the model is loaded, and lets the process compute once, which warms it up."""
        self.compute()
        self.seconds.clear()

    def compute(self) -> None:
        """Lets the process compute the values once; their time is added to :attr:`seconds`.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        while "seconds" not in (answer := self._read()):
            self.about = answer
        self.seconds.append(answer["seconds"])
        self.digest = answer["digest"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A worker has ended with {self.process.wait()}: see its message above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        """Ends the process and closes the pipes to it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # it may not have read all that it was sent
                if pipe is not None:
                    pipe.close()


# ---- the process that measures ------------------------------------------------------------------------------------


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs ``count`` processes inside the ``with`` that keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(count: int, settings: Sequence[str], options: argparse.Namespace) -> dict[str, Worker]:
    """Workers of each setting that have computed the values in turn, while ``count`` processes were busy."""
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        stack.enter_context(busy(count))
        for setting in settings:
            workers[setting] = Worker(setting, options)
            stack.callback(workers[setting].stop)
            workers[setting].start()
        for _ in range(options.rounds):
            for worker in workers.values():
                worker.compute()
    return workers


def rows_of(measured: dict[int, dict[str, Worker]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each number of busy processes and setting."""
    first = next(iter(measured.values()))
    idle = statistics.median(measured[0]["torch"].seconds) if "torch" in measured.get(0, {}) else None
    reference = first["torch"].digest if "torch" in first else next(iter(first.values())).digest
    rows = []
    for count, workers in measured.items():
        for setting, worker in workers.items():
            seconds = statistics.median(worker.seconds)
            rows.append({
                "busy": count, "setting": setting, "threads": worker.about["threads"],
                "seconds_a_fact": float(f"{seconds:.4g}"),
                "lowest": float(f"{min(worker.seconds):.4g}"), "highest": float(f"{max(worker.seconds):.4g}"),
                "times_torch_idle": round(seconds / idle, 3) if idle else "",
                "same_bits": worker.digest == reference, "rounds": len(worker.seconds), "facts": options.facts,
                "model": options.language_model, "cores": os.cpu_count(), "torch": worker.about["torch"],
                "date": date.today().isoformat(),
            })  # fmt: skip
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Appends rows to the table."""
    write_rows([*(kept_rows(read_rows(path)) if path.exists() else []), *rows], path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 3], help="numbers of busy processes")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5, help="computations of each setting, in turn")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each value")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--language_model", default="smollm2-135m")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file that rows are appended to")
    parser.add_argument("--worker", choices=list(SETTINGS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints a line for each number of busy processes and setting, and appends them to the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return []
    measured = {count: measure(count, options.settings, options) for count in options.busy}
    rows = rows_of(measured, options)
    for row in rows:
        print(
            f"beside {row['busy']}: {row['setting']:8} {row['threads']} threads, {row['seconds_a_fact']:g} s a fact "
            f"[{row['lowest']:g}, {row['highest']:g}], {row['times_torch_idle']} times torch's defaults when idle, "
            f"{'same' if row['same_bits'] else 'other'} bits"
        )
    made = made_here(ROOT, {name: value for name, value in vars(options).items() if name != "results"})
    write([row | made for row in rows], options.results)
    return rows


if __name__ == "__main__":
    main()
