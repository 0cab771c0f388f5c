"""Perplexity as a function of the tokens' log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def _token_perplexity_update(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-probabilities (float64 scalar) and number of tokens (long scalar)."""
    return -log_probs.double().sum(), torch.tensor(log_probs.numel())


def _token_perplexity_compute(total: Tensor, tokens: Tensor) -> Tensor:
    return (total / tokens).exp()


def token_perplexity(log_probs: Tensor) -> Tensor:
    """Exp of the mean negative log-probability of tokens.

    Args:
        log_probs: float, any shape: log-probability of each token, in nats.

    Returns:
        float64 scalar; NaN for no tokens.

    >>> round(float(token_perplexity(torch.log(torch.tensor([0.5, 0.125])))), 6)
    4.0
    """
    return _token_perplexity_compute(*_token_perplexity_update(log_probs))
