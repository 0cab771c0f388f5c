"""Perplexity from log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from editlab.metrics.functional.perplexity import _token_perplexity_compute, _token_perplexity_update


class TokenPerplexity(Metric):
    """exp of the mean negative log-probability of tokens.

    torchmetrics' own Perplexity needs logits over the whole vocabulary, ``[batch_size, seq_len, vocab_size]``; here
    only each token's own log-probability is needed, so the logits are never all in memory. ``update`` takes
    log-probabilities of any shape; ``compute`` gives a float64 scalar, NaN for no tokens. The function is
    :func:`editlab.metrics.functional.token_perplexity`.

    Args:
        kwargs: arguments of :class:`torchmetrics.Metric`.

    >>> metric = TokenPerplexity()
    >>> metric.update(torch.log(torch.tensor([0.5, 0.125])))
    >>> round(float(metric.compute()), 6)
    4.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor) -> None:
        """Adds tokens by their log-probabilities in nats, float of any shape."""
        total, count = _token_perplexity_update(log_probs)
        self.total += total.to(self.total)
        self.tokens += count.to(self.tokens)

    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar; NaN for no tokens."""
        return _token_perplexity_compute(self.total, self.tokens)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of one or several computed values."""
        return self._plot(val, ax)
