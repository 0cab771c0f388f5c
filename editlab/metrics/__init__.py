"""Metrics of edited models, as torchmetrics classes; :mod:`editlab.metrics.functional` has them as functions."""

from editlab.metrics.answers import AnswerScore, CaseScore
from editlab.metrics.editing import EditMetrics, EfficacyScore, NeighborhoodScore, ParaphraseScore
from editlab.metrics.generation import GenerationEntropy
from editlab.metrics.perplexity import TokenPerplexity
from editlab.metrics.retention import RetentionByAge
from editlab.metrics.scores import PromptScores

__all__ = [
    "AnswerScore",
    "CaseScore",
    "EditMetrics",
    "EfficacyScore",
    "GenerationEntropy",
    "NeighborhoodScore",
    "ParaphraseScore",
    "PromptScores",
    "RetentionByAge",
    "TokenPerplexity",
]
