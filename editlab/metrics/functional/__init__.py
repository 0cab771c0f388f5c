"""Metrics of edits as plain functions, one for each class in :mod:`editlab.metrics`."""

from editlab.metrics.functional.answers import (
    AnswerScores,
    answer_score,
    answer_scores,
    case_score,
    normalized,
    record_best,
)
from editlab.metrics.functional.editing import (
    efficacy_score,
    harmonic_mean,
    neighborhood_score,
    paraphrase_score,
    prompt_values,
    record_means,
)
from editlab.metrics.functional.generation import generation_entropy, ngram_entropy
from editlab.metrics.functional.perplexity import perplexity_interval, token_perplexity
from editlab.metrics.functional.retention import retention_by_age

__all__ = [
    "AnswerScores",
    "answer_score",
    "answer_scores",
    "case_score",
    "efficacy_score",
    "generation_entropy",
    "harmonic_mean",
    "neighborhood_score",
    "ngram_entropy",
    "normalized",
    "paraphrase_score",
    "perplexity_interval",
    "prompt_values",
    "record_best",
    "record_means",
    "retention_by_age",
    "token_perplexity",
]
