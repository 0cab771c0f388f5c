"""Portability: questions whose answers follow from an edit, in named groups such as ``reasoning`` or ``multi-hop``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from editlab.data.fact import Fact
from editlab.data.portability import ANY_COUNTS, cases
from editlab.evaluation.generation import Asked, any_counts
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import score_pairs
from editlab.lm.language_model import LanguageModel
from editlab.metrics import CaseScore
from editlab.metrics.names import portability_name


def questions(facts: Sequence[Fact], sample: Iterable[int]) -> list[Asked]:
    """The portability questions of the facts of a sample; those of a case have its number, if any of them counts.

    Args:
        facts: all facts that are measured.
        sample: indices of those whose questions are asked.
    """
    found: list[Asked] = []
    for i in sample:
        for case in cases(facts[i].portability):
            number = len(found) if case[0].group in ANY_COUNTS else None
            found += [Asked(i, portability_name(one.group), one.prompt, one.answers, number) for one in case]
    return found


def portability_accuracy(
    lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None, **kwargs: Any
) -> dict[str, float]:
    """``portability/GROUP/accuracy`` -> mean over facts; {} if no fact has questions.

    A question is right where the argmax is right at every token of its first answer. A fact counts by the mean of its
    questions in the group. In a group of :data:`editlab.data.portability.ANY_COUNTS` each case counts, as right where
    any of its questions is (:func:`editlab.data.portability.cases`).

    Args:
        lm: the model.
        facts: facts with :attr:`editlab.data.fact.Fact.portability`.
        cache: cache of the scores of the current weights; None measures everything.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """
    asked = questions(facts, range(len(facts)))
    if not asked:
        return {}
    _, hits = score_pairs(lm, [(one.prompt, one.names[0]) for one in asked], cache)
    metrics: dict[str, CaseScore] = {}
    for one, hit in zip(asked, hits.tolist(), strict=True):
        metric = metrics.setdefault(one.kind, CaseScore(any_counts(one.kind), **kwargs))
        metric.update(torch.tensor([float(hit)]), torch.tensor([one.index if one.case is None else one.case]))
    return {f"{group}/accuracy": float(metric.compute()) for group, metric in metrics.items()}
