"""The check of scores in two stages: which decisions bfloat16 changes, and whether the second stage restores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.errors import EditLabError
from editlab.evaluation.score_cache import Request, RoughScore, Score, ScoreCache
from editlab.evaluation.scoring import FactScores, score_facts
from editlab.lm.language_model import LanguageModel


@dataclass
class Agreement:
    """Counts over all prompts of some facts. A prompt has three decisions: the likelier target, and two hits."""

    facts: int = 0
    prompts: int = 0
    decisions: int = 0
    changed_by_bfloat16: int = 0
    """decisions of the first stage alone that are not those of float32"""
    changed_by_two_stages: int = 0
    """decisions of both stages that are not those of float32"""
    scored_again: int = 0
    """prompts of which the second stage has scored a target"""
    largest_error: float = 0.0
    """largest difference in nats of a log-probability between the first stage and float32"""
    farthest_turned: float = 0.0
    """of prompts whose likelier target is another one in float32, the largest distance of the targets in bfloat16, in
    nats: a margin above it finds all of these prompts"""

    def __add__(self, other: Agreement) -> Agreement:
        """The counts over the facts of both."""
        merged: dict[str, Any] = {}
        for name, mine in vars(self).items():
            its = getattr(other, name)
            merged[name] = max(mine, its) if isinstance(mine, float) else mine + its
        return Agreement(**merged)


class _FirstStage(ScoreCache):
    """The first stage's scores, which are in the cache already."""

    def __init__(self, cache: ScoreCache) -> None:
        super().__init__("")
        self.cache = cache

    def fetch(
        self, requests: Sequence[Request], find: Callable[[Sequence[Request]], Sequence[Score]]
    ) -> dict[Request, Score]:
        rough = self.cache.fetch_rough(requests, _absent)
        return {request: (score.logp, score.hit) for request, score in rough.items()}


def _absent(requests: Sequence[Request]) -> list[RoughScore]:
    raise EditLabError(f"{len(requests)} targets have no score of the first stage: the CPU has no bfloat16 products.")


def agreement(lm: LanguageModel, facts: Sequence[Fact]) -> Agreement:
    """Compares scores of facts in two stages with float32's, which the second stage reads instead of computing them.

    Args:
        lm: the model, with float32 weights, on a CPU with bfloat16 instructions.
        facts: facts with true targets.

    Raises:
        EditLabError: There is only one stage on this machine.
    """
    with TemporaryDirectory() as folder:
        cache = ScoreCache("check")
        cache.folder = Path(folder) / "scores"
        exact = _columns(score_facts(lm, facts, cache=cache))
        both = _columns(score_facts(lm, facts, cache=cache, two_stage=True))
        rough = _columns(score_facts(lm, facts, cache=_FirstStage(cache)))
    turned = rough[1][0] != exact[1][0]
    again = (both[0] == exact[0]) & (rough[0] != exact[0])
    return Agreement(
        facts=len(facts),
        prompts=exact[0].shape[1],
        decisions=exact[1].numel(),
        changed_by_bfloat16=int((rough[1] != exact[1]).sum()),
        changed_by_two_stages=int((both[1] != exact[1]).sum()),
        scored_again=int(again.any(0).sum()),
        largest_error=float((rough[0] - exact[0]).abs().max()),
        farthest_turned=float((rough[0][0] - rough[0][1]).abs()[turned].amax()) if bool(turned.any()) else 0.0,
    )


def _columns(scores: FactScores) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both targets, [2, prompts], and decisions, bool [3, prompts]."""
    groups = [some for some in (scores.edit, scores.paraphrases, scores.neighbors) if some is not None]
    logps = torch.cat([torch.stack([some.logp_new, some.logp_true]) for some in groups], 1)
    hits = torch.cat([torch.stack([some.hit_new, some.hit_true]) for some in groups], 1)
    return logps, torch.cat([(logps[:1] > logps[1:]), hits])
