"""Perplexity as a function of the tokens' log-probabilities."""

from __future__ import annotations

import math

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


def perplexity_interval(log_probs: Tensor) -> tuple[float, float]:
    """95% interval of a text's perplexity over its windows, for texts of the same kind.

    It is the exponential of the t-interval of the windows' mean negative log-probabilities. Two models are compared on
    the same windows, so the difference between their perplexities is far better known than each of them.

    Args:
        log_probs: float [windows], mean log-probability of a token in each window, in nats; windows of equal length.

    Returns:
        The lower and the upper end; NaN for fewer than two windows, or if a value is not finite.

    >>> low, high = perplexity_interval(torch.tensor([-1.0, -2.0, -3.0]))
    >>> round(low, 3), round(high, 3)  # exp(2 -+ 4.3027 * 1 / sqrt(3))
    (0.616, 88.601)
    """
    from scipy import stats  # here, because it takes long to import

    values = -log_probs.double().cpu()
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std()) / len(values) ** 0.5
    mean = float(values.mean())
    return _exp(mean - half), _exp(mean + half)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
