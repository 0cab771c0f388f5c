"""Generation entropy: whether an edited model still writes varied text or repeats itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from editlab.metrics.functional.generation import _generation_entropy_compute, _generation_entropy_update


class GenerationEntropy(Metric):
    """Generation entropy (GE): mean over texts of the weighted entropy of their 2-grams and 3-grams, in bits.

    ``update`` takes texts as sequences of token ids; ``compute`` gives a float64 scalar, NaN for no texts. The function
    is :func:`editlab.metrics.functional.generation_entropy`.

    Args:
        kwargs: arguments of :class:`torchmetrics.Metric`.

    >>> metric = GenerationEntropy()
    >>> metric.update([[1, 1, 1, 1], [2, 2, 2, 2]])
    >>> float(metric.compute())
    0.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    texts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("texts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, texts: Iterable[Sequence[int]]) -> None:
        """Adds generated texts, each a sequence of token ids; texts of fewer than three tokens do not count."""
        total, count = _generation_entropy_update(texts)
        self.total += total.to(self.total)
        self.texts += count.to(self.texts)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN if there was no text."""
        return _generation_entropy_compute(self.total, self.texts)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of one or several computed values."""
        return self._plot(val, ax)
