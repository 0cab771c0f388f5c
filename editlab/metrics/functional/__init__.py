"""Metrics of edits as plain functions, one for each class in :mod:`editlab.metrics`."""

from editlab.metrics.functional.editing import (
    efficacy_score,
    harmonic_mean,
    neighborhood_score,
    paraphrase_score,
    prompt_values,
    record_means,
)
from editlab.metrics.functional.generation import generation_entropy, ngram_entropy
from editlab.metrics.functional.perplexity import token_perplexity
from editlab.metrics.functional.retention import retention_by_age

__all__ = [
    "efficacy_score",
    "generation_entropy",
    "harmonic_mean",
    "neighborhood_score",
    "ngram_entropy",
    "paraphrase_score",
    "prompt_values",
    "record_means",
    "retention_by_age",
    "token_perplexity",
]
