"""Times of editlab's implementations and of plain ones on the same work, in turn: ratios, if the results agree.

    python scripts/benchmark.py                                   # SmolLM2-135M, every case but products and whole
    python scripts/benchmark.py --only values --facts 32 --profile
    python scripts/benchmark.py --only products --facts 96        # the type of our products alone
    python scripts/benchmark.py --only whole --facts 256 --batch_size 32      # the plain run alone takes an hour
    python scripts/benchmark.py --shape gpt2-xl --device cuda     # random weights of that shape: only speed counts

The plain ways (``editlab.experiments.reference``) do what the reference codes do. Rounds alternate (plain, ours, plain,
ours, ...), so that a machine that slows down slows both. Appends to ``results/performance.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from editlab.experiments.benchmark_cases import CASES, Round, Setting
from editlab.experiments.csv_files import kept_rows, read_rows, write_rows
from editlab.experiments.provenance import made_here
from editlab.lm.matmul import MATMULS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "performance.csv"


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Duration of ``work()`` in seconds, and its result."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a large matrix product on this machine: the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return max(2 * size**3 / timed(lambda: torch.mm(a, b), device)[0] for _ in range(5))


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and attention in ``work()``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(rounds: list[Round], device: torch.device, count: bool, title: str) -> dict[str, Any]:
    """Times the rounds of a case for both implementations in turn; FLOPs are counted in the first round."""
    row: dict[str, Any] = {}
    if count:
        ways = {"plain_gflop": rounds[0].plain, "our_gflop": rounds[0].ours}
        row |= {name: round(count_flops(way) / rounds[0].units / 1e9, 3) for name, way in ways.items()}
    rounds[0].ours()  # warm-up
    ratios, seconds, differences = [], [], []
    for some in tqdm(rounds, desc=title, unit="round", leave=False):
        slow, plain = timed(some.plain, device)
        fast, ours = timed(some.ours, device)
        ratios.append(slow / fast)
        seconds.append((slow / some.units, fast / some.units))
        differences.append(some.difference(plain, ours))
    plain_s, our_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    row |= {"rounds": len(rounds), "units": rounds[0].units, "plain_s": _digits(plain_s), "our_s": _digits(our_s),
            "ratio": round(statistics.median(ratios), 2), "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2), "difference": " ".join(f"{d:.1e}" for d in differences)}  # fmt: skip
    return row


def _digits(seconds: float) -> float:
    """A number with four significant digits, so that microseconds a token are not rounded to 0."""
    return float(f"{seconds:.4g}")


def profile(work: Callable[[], object]) -> list[tuple[str, float]]:
    """Fractions of the time by kind of operation, the largest first."""
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


def write(row: dict[str, Any], path: Path) -> None:
    """Adds a row to a CSV file; columns that other rows lack are empty in them."""
    write_rows([*(kept_rows(read_rows(path)) if path.exists() else []), row], path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="cases; default: all but products and whole")
    parser.add_argument("--facts", type=int, default=32, help="number of facts")
    parser.add_argument("--batch_size", type=int, default=16, help="facts in a round")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the moments, in four rounds")
    parser.add_argument("--path", default="worldfacts", help="fact file")
    parser.add_argument("--language_model", default="smollm2-135m")
    parser.add_argument("--shape", help="random weights instead: gpt2-xl or llama-3-8b")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--matmul", default="auto", choices=MATMULS, help="type of our products above the site")
    parser.add_argument("--profile", action="store_true", help="print the fractions of time by kind of operation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file that rows are appended to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the cases, prints a line for each, appends them to the table."""
    options = parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    setting = Setting.of(options)
    rate = matmul_rate(dtype, device)
    where = made_here(ROOT, {name: value for name, value in vars(options).items() if name != "results"})
    print(f"{where['machine']}, {torch.get_num_threads()} threads, torch {torch.__version__}: {rate / 1e9:.0f} GFLOP/s")
    rows = []
    for name in options.only or [case for case in CASES if case not in ("products", "whole")]:
        unit, make = CASES[name]
        rounds = make(setting)
        row = {"case": name, "model": options.shape or options.language_model, "unit": unit, "matmul": options.matmul}
        row |= {"plain_gflop": "", "our_gflop": ""} | measure(rounds, device, name != "whole", name)
        share = round(row["our_gflop"] * 1e9 / row["our_s"] / rate, 3) if row["our_gflop"] else ""
        row |= {"our_share_of_matmul_rate": share, "threads": torch.get_num_threads(),
                **where, "date": date.today().isoformat()}  # fmt: skip
        rows.append(row)
        write(row, options.results)
        print(
            f"{name:10} {row['ratio']:6.2f}x [{row['lowest']:.2f}, {row['highest']:.2f}]   plain {row['plain_s']:g}, "
            f"ours {row['our_s']:g} s a {unit}; GFLOP {row['plain_gflop']} and {row['our_gflop']}; "
            f"difference {row['difference']}",
            flush=True,
        )
        if options.profile:
            for kind, part in profile(rounds[0].ours):
                print(f"    {part:6.1%}  {kind}")
    return rows


if __name__ == "__main__":
    main()
