"""Growth of cost: time and memory of a step over edits made, batch size, key dimension and replay buffer.

    python scripts/benchmark_growth.py                       # minutes; up to d_k 14,336
    python scripts/benchmark_growth.py --largest 28672       # Llama-3-70B's, which takes 20 GB
    python scripts/benchmark_growth.py --only edits

Edits are made in sequence in a small random model, whose own cost is next to nothing, so that what grows shows. Batch
size, key dimension and buffer are the solver's, on random keys. Writes ``results/cost_growth.csv`` and
``figs/cost_growth.png`` (and ``.pdf``); axes that were not run stay as they are in the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig

from callbacks import MemoryReplay
from editlab import edit_model
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.csv_files import Row, kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.loading.load import load
from editlab.runs.figures import BLACK, BLUE, GREEN, in_print, printed_figure, save_figure
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT
from editlab.solver.preservation import Preservation
from editlab.values.settings import ValueSettings

ROOT = Path(__file__).resolve().parents[1]
D_K, D_V, BATCH = 1536, 576, 32
"""Dimensions of SmolLM2-135M's projection, and the batch size of the experiments."""
STYLES = {"": (BLUE, "-"), "plain": (BLACK, ":"), "replay": (GREEN, "--"), "consolidated": (BLUE, "-"),
          "solve": (BLUE, "-"), "metric": (GREEN, "--")}  # fmt: skip
"""series -> color and line"""
TITLES = {
    "edits": "edits made",
    "batch": "facts in a batch",
    "keys": "key dimension",
    "buffer": "edits replayed",
}


class Point(NamedTuple):
    """One measurement of time and memory, a row of the table."""

    series: str
    x: int
    seconds: float
    mib: float


def resident_mib() -> float:
    """Present memory of this process, as Linux reports it; NaN elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def best_of(work: Callable[[], object], times: int = 3) -> float:
    """Duration of the fastest of some calls, in seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


# ---- edits in sequence ----------------------------------------------------------------------------------------------


class _Clock(Callback):
    """Duration of each batch in seconds, and the memory of the process after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append((time.perf_counter() - self.start, resident_mib()))


def edits(options: argparse.Namespace) -> Iterator[Point]:
    """Batches of one long run each: plain, with replay of a full buffer, and with consolidated memory."""
    _, tokenizer = load("smollm2-135m", torch.float32)
    for series, memory in (
        ("plain", []),
        ("replay", [MemoryReplay(rate=0.3, capacity=500)]),
        ("consolidated", [MemoryReplay(memory="consolidated")]),
    ):
        clock = _Clock()
        _edit_many(tokenizer, options.edits, [*memory, clock])
        window = max(1, len(clock.seen) // 10)  # single batches jitter
        for end in range(window, len(clock.seen) + 1, window):
            some = clock.seen[end - window : end]
            yield Point(series, end * BATCH, statistics.median(s for s, _ in some), some[-1][1])


def _edit_many(tokenizer: Any, count: int, callbacks: list[Any]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    facts = [
        {"subject": f"Number {i}", "prompt": "{} lives in", "target": ("Rome", "Oslo", "Lima")[i % 3]}
        for i in range(count)
    ]
    edit_model(
        model, tokenizer, facts, layers=[1], batch_size=BATCH, callbacks=callbacks, progress=False,
        method=MEMIT(covariance_weight=1000), values=ValueSettings(steps=2),
        contexts=ContextSettings(count=1, length=3),
        moments=MomentSettings(tokens=4096, cache=False),
        evaluation=EvaluationSettings(heldout_tokens=0, generated_texts=0, generation=0, bystanders=0,
                                      immediate="edits"),
    )  # fmt: skip


# ---- the solver -----------------------------------------------------------------------------------------------------


def _keys(d_k: int, n: int) -> torch.Tensor:
    return torch.randn(d_k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def _metric(d_k: int) -> Preservation:
    moments = torch.eye(d_k, dtype=torch.float64)
    moments += 0.1 / d_k  # not diagonal; nothing of the work depends on the numbers
    return Preservation.from_moments(moments)


def _solving(metric: Preservation, d_k: int, n: int) -> Callable[[], object]:
    system = Constraints(_keys(d_k, n), torch.randn(D_V, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64))
    return lambda: solve(system, metric)


def batch(options: argparse.Namespace) -> Iterator[Point]:
    """One solve over more and more facts at SmolLM2-135M's dimensions."""
    metric = _metric(D_K)
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        yield Point("solve", n, best_of(_solving(metric, D_K, n)), resident_mib())


def buffer(options: argparse.Namespace) -> Iterator[Point]:
    """One solve of a batch with more and more replayed edits next to it."""
    metric = _metric(D_K)
    for m in (0, 10, 32, 96, 250, 500, 1000):
        yield Point("solve", m, best_of(_solving(metric, D_K, BATCH + m)), resident_mib())


def keys(options: argparse.Namespace) -> Iterator[Point]:
    """The metric, which a run factors once, and the solve of 128 facts, at larger and larger key dimensions."""
    for d_k in (768, 1536, 3072, 6400, 8192, 14336, 28672):
        if d_k <= options.largest:
            start = time.perf_counter()
            metric = _metric(d_k)
            yield Point("metric", d_k, time.perf_counter() - start, resident_mib())
            yield Point("solve", d_k, best_of(_solving(metric, d_k, 128), 1 if d_k > 8192 else 3), resident_mib())


AXES: dict[str, Callable[[argparse.Namespace], Iterator[Point]]] = {
    "edits": edits, "batch": batch, "keys": keys, "buffer": buffer,
}  # fmt: skip
"""name -> its measurements"""


# ---- table and figure -----------------------------------------------------------------------------------------------


def slopes(rows: list[Row]) -> dict[tuple[str, str], float]:
    """The power with which time grows over at least the last doubling of an axis, for each axis and series.

    1 is linear growth, 0 none.
    """
    found = {}
    for axis, series in dict.fromkeys((row["axis"], row["series"]) for row in rows):
        own = [(int(r["x"]), float(r["seconds"])) for r in rows if (r["axis"], r["series"]) == (axis, series)]
        last = own[-1]
        earlier = [point for point in own if 0 < 2 * point[0] <= last[0]]
        if earlier:
            ratios = torch.tensor([last[1] / earlier[-1][1], last[0] / earlier[-1][0]]).log()
            found[axis, series] = float(ratios[0] / ratios[1])
    return found


@in_print
def draw(rows: list[Row]) -> Figure:
    """A figure with a column for each axis: seconds above, memory below."""
    figure, axes = printed_figure(2 * len(AXES), height=2.2, columns=len(AXES))
    for column, axis in enumerate(AXES):
        for offset, (name, title) in enumerate((("seconds", "seconds"), ("mib", "memory, MiB"))):
            ax = axes[column + offset * len(AXES)]
            for series in dict.fromkeys(r["series"] for r in rows if r["axis"] == axis):
                own = [(int(r["x"]), float(r[name])) for r in rows if (r["axis"], r["series"]) == (axis, series)]
                color, line = STYLES[series]
                ax.plot(*zip(*own, strict=True), color=color, linestyle=line, marker="o", markersize=3, label=series)
            ax.set(xlabel=TITLES[axis], title=title if column == 0 else "")
            if axis == "buffer":
                ax.set_xscale("symlog", linthresh=10)  # with nothing replayed at its left end
            elif axis != "edits":
                ax.set_xscale("log")
            if axis != "edits" and name == "seconds":
                ax.set_yscale("log")
            elif math.isfinite(ax.dataLim.y1):  # unless there are no points, or memory cannot be read
                ax.set_ylim(0, 1.08 * ax.dataLim.y1)
            if offset == 0 and ax.lines:
                ax.legend(frameon=False, fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES), help="axes")
    parser.add_argument("--edits", type=int, default=5000, help="edits in the sequence")
    parser.add_argument("--largest", type=int, default=14336, help="largest key dimension")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder whose results/ and figs/ are written to")
    options = parser.parse_args(arguments)
    path = options.out / "results" / "cost_growth.csv"
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    found = {"threads": torch.get_num_threads(), **made_here(ROOT, settings)}
    earlier = kept_rows(read_rows(path)) if path.exists() else []
    rows = [row for row in earlier if row["axis"] not in options.only]
    for axis in options.only:
        for point in AXES[axis](options):
            rows.append({"axis": axis, "series": point.series, "x": point.x, "seconds": f"{point.seconds:.4g}",
                         "mib": f"{point.mib:.0f}", **found})  # fmt: skip
            print(f"{axis:8} {point.series:13} {point.x:6d}  {point.seconds:9.4f} s  {point.mib:7.0f} MiB", flush=True)
    write_rows(rows, path)
    save_figure(draw(rows), options.out / "figs" / "cost_growth.png")
    for (axis, series), slope in slopes(rows).items():
        print(f"{axis:8} {series:13} grows by the power {slope:.2f} at its end")


if __name__ == "__main__":
    main()
