"""Bystanders: facts about other subjects that are never edited, on which an edited model should answer as before."""

from __future__ import annotations

from collections.abc import Sequence

from editlab.data.fact import Fact
from editlab.evaluation.generation import Asked
from editlab.evaluation.score_cache import ScoreCache
from editlab.evaluation.scoring import score_pairs
from editlab.lm.language_model import LanguageModel
from editlab.metrics.names import BYSTANDER, BYSTANDER_ACCURACY


def bystander_accuracy(lm: LanguageModel, facts: Sequence[Fact], cache: ScoreCache | None = None) -> dict[str, float]:
    """``bystander_accuracy``: fraction of facts where the argmax is right at every token of the truth.

    Args:
        lm: the model.
        facts: bystanders; those without a true target do not count.
        cache: cache of the scores of the current weights; None measures everything.

    Returns:
        The fraction by its name; {} for no facts.
    """
    pairs = [(fact.question, fact.target_true) for fact in facts if fact.target_true is not None]
    if not pairs:
        return {}
    _, hits = score_pairs(lm, pairs, cache)
    return {BYSTANDER_ACCURACY: float(hits.double().mean())}


def prompts_of_bystanders(facts: Sequence[Fact]) -> list[Asked]:
    """The prompt of each bystander, whose right answer is its truth or one of the truth's aliases."""
    return [
        Asked(index, BYSTANDER, fact.question, (fact.target_true, *fact.truth_aliases))
        for index, fact in enumerate(facts)
        if fact.target_true is not None
    ]
