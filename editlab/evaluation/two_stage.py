"""Scores in two stages: bfloat16 products for all prompts, then float32 for those whose decisions rounding may change.

ES, PS, NS and the accuracies count decisions: which of two targets is more likely, and whether a target is the argmax
at each of its tokens. Rounding changes a decision only if it moves a log-probability by more than the decision's
distance from a tie. So only prompts within a margin of a tie are scored again, and the decisions are those of float32,
as long as no rounding error exceeds the margin. Each call compares the two stages on the prompts that both have scored
and widens the margin where their largest difference comes too close to it.

The log-probabilities of prompts that were not scored again are those of the first stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from editlab.evaluation.score_cache import Request, RoughScore, Score
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import bfloat16_products, multiplies_bfloat16
from editlab.lm.precision import cast_to

log = logging.getLogger(__name__)

EXACT_BLOCKS = 3
"""Number of the lowest blocks that stay in float32 in the first stage. The first blocks write very large activations at
the first token, to which all later tokens attend: rounded there, a few prompts in a thousand change by twice as much as
any other."""

MARGIN = 0.3
"""Distance from a tie in nats within which a prompt is scored again: 2.4 times the largest distance at which rounding
turned a decision of SmolLM2-135M (``results/two_stage_scores.csv``)."""

SAFETY = 1.5
"""The margin is at least this many times the largest difference of the two stages in the same call."""

CONTROL = 64
"""One of this many targets is scored again wherever it stands, so that the two stages are compared in every call."""


def rounds_first(lm: LanguageModel) -> bool:
    """Return whether two stages save time: the weights are float32, and the CPU has instructions for bfloat16."""
    return lm.model.dtype == torch.float32 and multiplies_bfloat16(lm.device) and not cast_to(lm.device)


def first_stage(lm: LanguageModel) -> AbstractContextManager[None]:
    """A context in which the head and all blocks but the lowest multiply in bfloat16."""
    return bfloat16_products(list(lm.anatomy.blocks)[EXACT_BLOCKS:], lm.anatomy.edit_path, lm.anatomy.head)


def refine(
    rough: Mapping[Request, RoughScore],
    compared: Sequence[tuple[Request, Request]],
    again: Callable[[Sequence[Request]], Mapping[Request, Score]],
    margin: float = MARGIN,
) -> dict[Request, Score]:
    """Return scores whose decisions are those of the second stage.

    Args:
        rough: scores of the first stage.
        compared: pairs of targets of which one is more likely; a score that is not compared counts only as a hit.
        again: scores targets in the second stage.
        margin: distance from a tie within which a target is scored again.

    Returns:
        The score of the second stage for all targets within the margin of a tie, of the first stage for all others.
    """
    exact: dict[Request, Score] = {}
    wanted = set(list(rough)[::CONTROL])
    start = margin
    while True:
        wanted |= near_ties(rough, compared, margin)
        missing = [request for request in rough if request in wanted and request not in exact]
        if not missing:
            break
        exact |= again(missing)
        margin = max(margin, SAFETY * _largest((rough[request].logp, exact[request][0]) for request in exact))
    if margin > start:
        log.info(
            "bfloat16 products change log-probabilities of this model by up to %.2f nats: all targets within %.2f nats "
            "of a tie were scored in float32.", margin / SAFETY, margin,
        )  # fmt: skip
    return {request: exact.get(request, (score.logp, score.hit)) for request, score in rough.items()}


def near_ties(
    rough: Mapping[Request, RoughScore], compared: Iterable[tuple[Request, Request]], margin: float
) -> set[Request]:
    """Return the targets of which a decision is within the margin of a tie; NaN counts as a tie."""
    near = {request for request, score in rough.items() if not score.gap >= margin}
    for pair in compared:
        if not abs(rough[pair[0]].logp - rough[pair[1]].logp) >= margin:
            near.update(pair)
    return near


def _largest(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the largest difference of finite numbers in a pair; 0 if there is none."""
    return max((abs(a - b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)), default=0.0)
