"""Time and quality of values that are found in different ways: the same facts, in turn, and one solve with each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from editlab.api import edit_model
from editlab.data.fact import Fact
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.reference import plain_value
from editlab.keys.contexts import ContextSettings, sample_contexts
from editlab.keys.subject_keys import Site
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import products_above
from editlab.solver.methods import EMMET
from editlab.values.cache import ValueCache
from editlab.values.loss import ValueGroup, rows_of
from editlab.values.optimize import loss_of, optimize_values
from editlab.values.settings import PUBLISHED_SEARCH, ValueSettings

LAYERS = (2, 3, 4, 5, 6)
"""The layers of configs/emmet_replay.yaml; values are found at the last one."""

METRICS = (
    "ES", "accuracy", "PS", "paraphrase_accuracy", "NS", "neighbor_accuracy", "bystander_accuracy", "perplexity",
)  # fmt: skip

FALLING: dict[str, Any] = {"lr": 1.4, "lr_end": 0.05, "betas": (0.5, 0.9), "steps": 22, "contexts_a_step": None}
"""Adam with larger steps that fall, and averages that forget sooner, for fewer steps at the same loss."""

WAYS: dict[str, dict[str, Any]] = {
    "all contexts": PUBLISHED_SEARCH,
    "three contexts a step": {**PUBLISHED_SEARCH, "contexts_a_step": 3},
    "two contexts a step": {**PUBLISHED_SEARCH, "contexts_a_step": 2},
    "one context a step": {**PUBLISHED_SEARCH, "contexts_a_step": 1},
    "falling steps": FALLING,
    "falling steps, two contexts a step": {**FALLING, "contexts_a_step": 2},
    "falling steps from 2.0, two contexts a step": {**FALLING, "lr": 2.0, "contexts_a_step": 2},
    "falling steps from 1.0, two contexts a step": {**FALLING, "lr": 1.0, "contexts_a_step": 2},
    "early_stop 2": {**PUBLISHED_SEARCH, "early_stop": 2},
    "early_stop 2, two contexts a step": {**PUBLISHED_SEARCH, "early_stop": 2, "contexts_a_step": 2},
}
"""Name of a way to find values -> its settings. The search of the published codes is "all contexts"."""


@dataclass
class Found:
    """What one way found for all facts, round by round."""

    seconds: list[float] = field(default_factory=list)
    """processor time of each round, for each fact: other programs on the machine hardly change it"""
    targets: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


def measure(
    lm: LanguageModel, facts: Sequence[Fact], ways: Sequence[str], rounds: int, plain: int = 0
) -> list[dict[str, Any]]:
    """Finds the values of all facts in each way, the ways in turn, and edits the facts once with each.

    Args:
        lm: the unedited model.
        facts: the facts.
        ways: names in :data:`WAYS`; times are compared with the first one's.
        rounds: number of parts of the facts; all ways find the values of a part before the next part begins.
        plain: number of facts of each part that the plain way (:mod:`editlab.experiments.reference`, with the
            published search) is timed on too; 0: it is not.

    Returns:
        A row for each way.
    """
    site, contexts = Site.of(lm, LAYERS[-1]), sample_contexts(lm, ContextSettings())
    settings = {way: replace(ValueSettings(reference="original"), **WAYS[way]) for way in ways}
    found = {way: Found() for way in ways}
    size = -(-len(facts) // rounds)
    optimize_values(lm, facts[:2], site, contexts, replace(settings[ways[0]], steps=3))  # the first call is slower
    plainly: list[float] = []
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        if plain:
            plainly.append(_plain_seconds(lm, part[:plain], site, contexts))
        for way in ways:
            begun = time.process_time()
            values = optimize_values(lm, part, site, contexts, settings[way])
            found[way].seconds.append((time.process_time() - begun) / len(part))
            found[way].targets.append(values.target)
            found[way].steps.append(values.steps)
    rows = []
    for way in ways:
        targets, first = torch.cat(found[way].targets), found[ways[0]].seconds
        ratios = [a / b for a, b in zip(first, found[way].seconds, strict=True)]
        losses, hits, distances = losses_of(lm, facts, site, contexts, settings[way], targets)
        against_plain = [a / b for a, b in zip(plainly, found[way].seconds, strict=plain > 0)]
        rows.append({
            "way": way, "facts": len(facts), "steps": f"{float(torch.cat(found[way].steps).double().mean()):.2f}",
            "cpu_seconds": f"{statistics.median(found[way].seconds):.3f}", "ratio": f"{statistics.median(ratios):.2f}",
            "lowest": f"{min(ratios):.2f}", "highest": f"{max(ratios):.2f}", "loss": f"{float(losses.mean()):.4f}",
            "hits": f"{float(hits.double().mean()):.3f}", "distance": f"{float(distances.double().mean()):.3f}",
            **scores_after(lm, facts, site, settings[way], targets),
            **({"times_plain": f"{statistics.median(against_plain):.1f}"} if plain else {}),
        })  # fmt: skip
    return rows


def _plain_seconds(lm: LanguageModel, facts: Sequence[Fact], site: Site, contexts: Sequence[str]) -> float:
    """Processor time of the plain way for each fact, with the published search."""
    begun = time.process_time()
    for fact in facts:
        plain_value(lm, fact, site, contexts, ValueSettings(**PUBLISHED_SEARCH))
    return (time.process_time() - begun) / len(facts)


@torch.no_grad()
def losses_of(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    contexts: Sequence[str],
    settings: ValueSettings,
    targets: Tensor,
    together: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each fact's value its loss over all contexts, whether the target is the argmax in each, and how far it lies.

    Returns:
        [n] in nats, bool [n], and [n]: the distance from v0 in units of its norm.
    """
    losses, hits, distances = [], [], []
    with products_above(lm, site.layer, settings.matmul, head=True):
        for start in range(0, len(facts), together):
            some = facts[start : start + together]
            group = ValueGroup(
                lm, site, [rows_of(lm, i, fact, contexts, settings.kl_position) for i, fact in enumerate(some)]
            )
            group.losses(torch.zeros_like(group.origin))  # what the KL term compares with
            delta = targets[start : start + together].to(group.origin) - group.origin
            loss, hit = loss_of(group, delta, group.origin.norm(dim=1), settings)
            losses.append(loss.cpu())
            hits.append(hit.cpu())
            distances.append((delta.norm(dim=1) / group.origin.norm(dim=1)).cpu())
    return torch.cat(losses), torch.cat(hits), torch.cat(distances)


def scores_after(
    lm: LanguageModel, facts: Sequence[Fact], site: Site, settings: ValueSettings, targets: Tensor
) -> Mapping[str, str]:
    """Scores of all facts after one solve with these values, as in configs/emmet_replay.yaml; edits are taken back."""
    contexts = sample_contexts(lm, ContextSettings())
    cache = ValueCache.of(lm, model_key(fingerprint(lm.model), lm.model), site, contexts, settings)
    cache.fetch(facts, lambda missing: targets[[facts.index(fact) for fact in missing]])
    evaluation = EvaluationSettings(heldout_tokens=8192, generated_texts=0, generation=0, immediate="edits")
    _, result = edit_model(
        lm.model, lm.tokenizer, facts, layers=LAYERS, batch_size=len(facts), progress=False, values=settings,
        method=EMMET(covariance_weight=3000, gram_ridge=0.1), preserve_prompt_tokens=1.0, evaluation=evaluation,
    )  # fmt: skip
    found = result.retained
    result.revert()
    return {name: f"{found[name]:.3f}" for name in METRICS if name in found}
