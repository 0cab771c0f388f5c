"""Check editlab on a GPU, and time its parts at the shapes of real models; under eight minutes on one data-center GPU.

    python scripts/gpu_check.py                       # on cuda:0
    python scripts/gpu_check.py --device cpu --tiny   # everything at toy sizes, in seconds: a rehearsal

It runs the main job (the recipe configs/emmet.yaml on 32 facts), and for models of GPT-2 XL's and Llama-3-8B's shapes,
with random bfloat16 weights that are made on the device: values, second moments, the factor of the metric, the solve.
It prints one table, and ends with 1 where a part failed or there is no such device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.keys.moments import WINDOW, accumulate
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import device_named
from editlab.lm.precision import widened
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT
from editlab.utils.progress import bars
from editlab.values.optimize import optimize_values
from editlab.values.settings import ValueSettings

ROOT = Path(__file__).parents[1]
CONTEXTS = ["", "The book says that ", "In the news today: ", "It is known that "]
PLACES = ["Arlen", "Brone", "Caldor", "Dunmere", "Esk", "Farholt", "Galen", "Hartwick"]


@dataclass(frozen=True)
class Shape:
    """A model's shape and the parts that are timed at it."""

    name: str
    config: PretrainedConfig
    layer: int
    facts: int
    steps: int
    tokens: int
    """number of tokens of the second moments"""


SHAPES = [
    Shape("GPT-2 XL", GPT2Config(n_embd=1600, n_layer=48, n_head=25, n_positions=1024), 17, 16, 20, 16384),
    Shape(
        "Llama-3-8B",
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192,
        ),
        8, 16, 20, 16384,
    ),
]  # fmt: skip
TINY = [
    Shape("tiny GPT-2", GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, vocab_size=300), 1, 2, 2, 256),
    Shape(
        "tiny Llama",
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        ),
        1, 2, 2, 256,
    ),
]  # fmt: skip


@dataclass
class Timings:
    """The rows of the table."""

    device: torch.device
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False

    def take(self, what: str, work: Callable[[], str]) -> None:
        """Run a part and add a row with its time and the text that it returns, or its error."""
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            note = work()
        except Exception as error:  # one part that fails must not hide how the others do
            self.failed, note = True, f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:90]
        self._wait()
        seconds = time.perf_counter() - start
        if self.device.type == "cuda":
            note += f"; peak {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"
        self.rows.append((what, f"{seconds:8.2f} s", note))
        print(f"{what:34} {seconds:8.2f} s  {note}", flush=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> int:
    """Run all parts; return the exit status."""
    parser = argparse.ArgumentParser(description="Check editlab on a GPU, and time its parts.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, mps or cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a rehearsal that ends in seconds")
    given = parser.parse_args()
    try:
        device = device_named(given.device)
    except UserError:
        print(f"There is no device {given.device} on this machine, so nothing was measured.", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}\n")
    timings = Timings(device)
    transformers.logging.set_verbosity_error()
    with bars(False):
        if not given.tiny:
            timings.take("main job, 32 facts", lambda: main_job(device))
        for shape in TINY if given.tiny else SHAPES:
            check_shape(shape, timings)
    return int(timings.failed)


def main_job(device: torch.device) -> str:
    """Run the recipe configs/emmet.yaml on its built-in model."""
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    command = [sys.executable, "-c", "from editlab.cli.main import main; raise SystemExit(main())", "fit"]
    command += ["--config", str(ROOT / "configs" / "emmet.yaml"), "--data.limit", "32"]
    command += ["--trainer.accelerator", accelerator, "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    lines = [line.split() for line in done.stdout.splitlines()]
    scores = [f"{words[0]} {words[-1]}" for words in lines if words[:1] in (["ES"], ["accuracy"])]
    return "retained " + ", ".join(scores)


def check_shape(shape: Shape, timings: Timings) -> None:
    """Time values, moments, factor and solve at one shape."""
    device, facts = timings.device, made_up(shape.facts)
    made: dict[str, LanguageModel] = {}

    def take_in() -> str:
        made["lm"] = random_model(shape.config, device)
        return f"{sum(p.numel() for p in made['lm'].parameters()) / 1e9:.2f}e9 weights in bfloat16"

    timings.take(f"{shape.name}: random weights", take_in)
    if "lm" not in made:
        return
    lm = made["lm"]
    site = Site.of(lm, shape.layer)
    solver = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    kept: dict[str, torch.Tensor] = {}

    def values() -> str:
        settings = ValueSettings(steps=shape.steps, loss_threshold=0.0)
        start = time.perf_counter()
        kept["target"] = optimize_values(lm, facts, site, CONTEXTS, settings).target
        each = (time.perf_counter() - start) / len(facts)
        return f"{1 / each:.2f} facts/s at {shape.steps} steps, {len(CONTEXTS)} prompts a fact"

    def moments() -> str:
        ids = torch.randint(256, (shape.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        kept["moments"] = accumulate(lm, [shape.layer], windows, solver)[shape.layer]
        return f"{shape.tokens} tokens, one layer, d_k {len(kept['moments'])}"

    def factor_and_solve() -> str:
        metric = MEMIT(covariance_weight=300).preservation(kept["moments"], solver)
        keys = read_keys(lm, facts, shape.layer, site, CONTEXTS, "bare", solver)
        residuals = widened(kept["target"], solver).T - keys.current
        slack = torch.ones(len(facts), dtype=torch.float64, device=solver)
        solution = solve(Constraints(keys.keys, residuals, slack), metric)
        if not bool(solution.delta.isfinite().all()):
            raise ArithmeticError("the update is not finite")
        return f"on {metric.device}, residual left {solution.residual:.3f}"

    timings.take(f"{shape.name}: values, first", values)
    timings.take(f"{shape.name}: values, again", values)
    timings.take(f"{shape.name}: second moments", moments)
    timings.take(f"{shape.name}: factor and solve", factor_and_solve)


def made_up(count: int) -> list[Fact]:
    """Facts about invented places, since a model with random weights knows no facts."""
    return [
        Fact(f"{PLACES[i % len(PLACES)]} {i}", "The capital of {} is", PLACES[(i + 3) % len(PLACES)])
        for i in range(count)
    ]


def random_model(config: PretrainedConfig, device: torch.device) -> LanguageModel:
    """A model of that shape with random bfloat16 weights, created on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return LanguageModel(model.eval().requires_grad_(False), byte_tokenizer())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    sys.exit(main())
