"""Memory and time of editing large models, computed from counted FLOPs and bytes; nothing is measured.

``python -m editlab.experiments.scaling`` prints the table of docs/how-to/several-devices.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

RATE = 0.4 * 989e12
"""FLOP/s: 40% of an H100's peak of dense bfloat16 products."""
RATE_64 = 0.4 * 67e12
"""FLOP/s: 40% of its peak of float64 products."""
MEMORY = 80e9
"""Bytes of one H100."""

SITE = 0.25
"""Depth of the edited layer, as a fraction of all layers."""
ROWS, TAIL, PREFIX, PREDICTED = 7, 8, 16, 13
"""Of a fact: its prompts (six contexts and the KL prompt), the tokens of each from the subject's last one on and before
it, and the positions whose logits are needed (two target tokens in each context, and one for the KL)."""
STEPS, GROUP = 25, 512
"""Evaluations of the loss; padded tokens optimized together (model.values.batch_tokens)."""
SCORED = 240
"""Tokens that score one CounterFact record once (13 prompts, two continuations, shared beginnings run once)."""


@dataclass(frozen=True)
class Shape:
    """A Llama model by its published sizes."""

    name: str
    blocks: int
    d: int
    d_ff: int
    d_kv: int
    vocabulary: int

    @property
    def block(self) -> int:
        """Parameters of one block: queries and output, keys and values, three maps of the MLP, two norms."""
        return 2 * self.d**2 + 2 * self.d * self.d_kv + 3 * self.d * self.d_ff + 2 * self.d

    @property
    def parameters(self) -> int:
        """Of the whole model; the output embeddings are its own."""
        return self.blocks * self.block + 2 * self.vocabulary * self.d + self.d

    @property
    def tokens(self) -> int:
        """Of text for the second moments: ten times d_k."""
        return 10 * self.d_ff

    def forward(self, tokens: int, fraction: float = 1.0) -> float:
        """FLOPs of a forward pass through a fraction of the blocks, without the head: 2 a parameter and token."""
        return 2 * tokens * fraction * self.blocks * self.block

    def value(self) -> float:
        """FLOPs of one fact's value: the prefixes once; each step forward and back to the activations, and the head."""
        step = 2 * self.forward(ROWS * TAIL, 1 - SITE) + 4 * PREDICTED * self.vocabulary * self.d
        return self.forward(ROWS * PREFIX) + STEPS * step

    def activations(self) -> float:
        """Bytes kept for the backward pass: about 10 d + 4 d_ff numbers of 2 bytes a token and block above the site."""
        return GROUP * (1 - SITE) * self.blocks * 2 * (10 * self.d + 4 * self.d_ff)

    def moments(self) -> float:
        """Seconds of one layer's second moments: text through the blocks below, and k k^T in float64."""
        return self.forward(self.tokens, SITE) / RATE + 2 * self.tokens * self.d_ff**2 / RATE_64

    def update(self) -> int:
        """Bytes of one layer's sum of updates, float32: in memory, in a checkpoint, and sent to each rank a batch."""
        return 4 * self.d * self.d_ff

    def metric(self) -> int:
        """Bytes of one layer's metric, float64."""
        return 8 * self.d_ff**2

    def solve(self, n: int = 100) -> float:
        """Seconds of one layer's solve of n facts: keys whitened and back (k^2 each), and the update (2 d k)."""
        return n * (2 * self.d_ff**2 + 2 * self.d * self.d_ff) / RATE_64


SHAPES = (
    Shape("7B", 32, 4096, 11008, 4096, 32000),
    Shape("70B", 80, 8192, 28672, 1024, 128256),
    Shape("405B", 126, 16384, 53248, 1024, 128256),
)
"""Llama 2 7B, Llama 3.1 70B and 405B."""

ROWS_OF_TABLE: tuple[tuple[str, Callable[[Shape], str]], ...] = (
    ("parameters", lambda s: f"{s.parameters / 1e9:.2f} billion"),
    ("weights in bfloat16", lambda s: f"{2 * s.parameters / 1e9:.0f} GB"),
    ("activations of the values", lambda s: f"{s.activations() / 1e9:.1f} GB"),
    ("metric of one layer", lambda s: f"{s.metric() / 1e9:.1f} GB"),
    ("sum of updates of one layer (and its checkpoint)", lambda s: f"{s.update() / 1e9:.2f} GB"),
    ("GPUs of 80 GB that hold one copy, one layer edited", lambda s: f"{_gpus(s)}"),
    ("value of one fact", lambda s: f"{s.value() / 1e12:.0f} TFLOP, {s.value() / RATE:.2f} s"),
    ("solve of 100 facts, one layer", lambda s: f"{s.solve():.2f} s"),
    ("scores of one fact, once", lambda s: f"{s.forward(SCORED) / RATE:.3f} s"),
    ("second moments of one layer, once a model", lambda s: f"{s.moments() / 60:.1f} min"),
    ("1000 facts, one copy of the model", lambda s: f"{_run(s, 1) / 60:.0f} min"),
    ("1000 facts, eight copies", lambda s: f"{_run(s, 8) / 60:.1f} min"),
)


def _gpus(shape: Shape) -> int:
    """Weights, activations, metric, and two copies of the sum (and half as much for the original)."""
    needed = 2 * shape.parameters + shape.activations() + shape.metric() + 2.5 * shape.update()
    return int(-(-needed // MEMORY))


def _run(shape: Shape, ranks: int) -> float:
    """Seconds of 1000 facts in batches of 100: values and three scorings are shared, solves are not."""
    shared = 1000 * (shape.value() + 3 * shape.forward(SCORED)) / RATE
    return shared / ranks + 10 * shape.solve()


def table() -> str:
    """The table as Markdown."""
    lines = ["| computed, not measured | " + " | ".join(s.name for s in SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    lines += [f"| {title} | " + " | ".join(cell(s) for s in SHAPES) + " |" for title, cell in ROWS_OF_TABLE]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
