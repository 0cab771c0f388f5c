"""Generation entropy as a function."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def ngram_entropy(tokens: Sequence[int], weights: tuple[float, float] = (2 / 3, 4 / 3)) -> float:
    """Weighted mean of the entropies, in bits, of the 2-grams and 3-grams of one text.

    This is ROME's measure of fluency (Meng et al. 2022, arXiv:2202.05262, section 3.4, after Zhang et al. 2018): a text
    that repeats itself has a low entropy. It is (w2 H2 + w3 H3) / 2 with H_n = -sum f log2 f over the relative
    frequencies f of the n-grams.

    Args:
        tokens: token ids of the text.
        weights: w2 and w3.

    Returns:
        The entropy in bits; NaN for fewer than three tokens.

    >>> ngram_entropy([5, 5, 5, 5])
    0.0
    """
    if len(tokens) < 3:
        return math.nan
    total = 0.0
    for n, weight in zip((2, 3), weights, strict=True):
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        everything = sum(counts.values())
        total -= weight * sum(c / everything * math.log2(c / everything) for c in counts.values())
    return total / 2 + 0.0


def _generation_entropy_update(texts: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sum of the entropies (float64 scalar) and number of texts (long scalar); shorter texts do not count."""
    entropies = [ngram_entropy(list(text)) for text in texts if len(text) >= 3]
    return torch.tensor(sum(entropies, 0.0), dtype=torch.float64), torch.tensor(len(entropies))


def _generation_entropy_compute(total: Tensor, texts: Tensor) -> Tensor:
    return total / texts


def generation_entropy(texts: Iterable[Sequence[int]]) -> Tensor:
    """Generation entropy (GE): mean over texts of the weighted entropy of their 2-grams and 3-grams, in bits.

    Args:
        texts: token ids of each generated text; texts of fewer than three tokens do not count.

    Returns:
        float64 scalar; NaN for no texts.

    >>> float(generation_entropy([[1, 1, 1, 1], [2, 2, 2, 2]]))
    0.0
    """
    return _generation_entropy_compute(*_generation_entropy_update(texts))
