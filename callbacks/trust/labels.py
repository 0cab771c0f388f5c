"""Labels of batches from forks, injected faults and gate events; error rates and areas under curves. No model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from callbacks.trust.learned import LearnedScorer, replayed
from editlab.experiments.statistics import Difference, quantiles, roc_area
from editlab.runs.event_log import EventLog

LOSSES = ("facts", "NS", "nll")
"""The quantities that a batch may harm: right facts, neighbors, and the mean negative log-probability of a text."""
ENOUGH = 5
"""Least number of bad batches for which intervals are computed."""
SIGNALS = {"norm only": ("update_norm", 1.0), "perplexity only": ("heldout_ppl_delta", 1.0),
           "gain only": ("edit_success_gain", -1.0), "certainty only": ("certainty", -1.0)}  # fmt: skip
"""gate -> the one signal of ``trust_events.jsonl`` that it rejects batches by, and its sign"""
GATES = ("trust", "learned", *SIGNALS)
"""``trust`` is the score that the run's own gate recorded, ``learned`` the shipped learned score of its signals."""


@dataclass(frozen=True)
class Batch:
    """One batch of one run: each gate's suspicion, its fault if one was injected, and the losses from accepting it."""

    run: str
    step: int
    suspicion: Mapping[str, float]
    """gate -> a number; the highest are rejected first. Trust's is 1 - score"""
    fault: str | None
    losses: Mapping[int, Mapping[str, float]]
    """0 right after the batch, 1 a few batches later -> loss by name"""


def losses(event: Mapping[str, Any]) -> dict[str, float]:
    """The loss from accepting a batch instead of rejecting it: fraction of right facts, NS, log-perplexity.

    The batch's own facts count by their paraphrases, so that its gain is weighed against its loss of earlier edits.
    Earlier edits are a sample, which is scaled up to all of them.
    """
    accept, reject = event["accept"], event["reject"]
    own, edited = reject["own_asked"], event["edited"]
    rate = (reject["past"] - accept["past"]) / reject["past_asked"] if reject["past_asked"] else 0.0
    worst = {"nll": 100.0, "NS": 0.0}  # values of a branch whose model gives no finite numbers
    found = {"facts": (rate * edited - (accept["own"] - reject["own"])) / max(1, edited + own)}
    found["NS"] = _number(reject["NS"], worst["NS"]) - _number(accept["NS"], worst["NS"])
    found["nll"] = _number(accept["nll"], worst["nll"]) - _number(reject["nll"], worst["nll"])
    return found


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def read_batches(folder: Path) -> list[Batch]:
    """The batches of one run's folder that the gate has judged.

    A batch that it rolled back without signals, as no finite one could be measured, is infinitely suspicious to all.
    """
    faults = {int(k): v for k, v in json.loads((folder / "faults.json").read_text(encoding="utf-8"))["faults"].items()}
    forks: dict[int, dict[int, dict[str, float]]] = {}
    for event in EventLog(folder / "fork.jsonl").read():
        forks.setdefault(event["step"], {})[min(event["later"], 1)] = losses(event)
    batches = []
    events = [event for event in EventLog(folder / "trust_events.jsonl").read() if event["kind"] == "batch"]
    for event, learned in zip(events, replayed(events, LearnedScorer()), strict=True):
        if event["signals"] or event["decision"] == "rollback":
            found = dict.fromkeys(GATES, math.inf)
            if learned is not None:
                found |= {name: sign * event["signals"].get(key, 0.0) for name, (key, sign) in SIGNALS.items()}
                found |= {"trust": 1.0 - event["score"], "learned": 1.0 - learned}
            step = event["step"]
            batches.append(Batch(str(folder), step, found, faults.get(step), forks.get(step, {})))
    return batches


def taus(ordinary: Sequence[Batch], later: int) -> dict[str, float]:
    """Losses beyond which a batch is bad: the largest that any batch of the runs without faults caused.

    Most losses are a few changed answers of a finite sample. Robust deviations of such counts are often 0, and three of
    them would call every tenth batch without a fault bad.
    """
    return {
        name: max((batch.losses[later][name] for batch in ordinary if later in batch.losses), default=math.inf)
        for name in LOSSES
    }


def is_bad(batch: Batch, tau: Mapping[str, float], later: int) -> bool:
    """Whether accepting the batch lost more than ``tau`` of any loss."""
    return any(batch.losses[later][name] > tau[name] for name in LOSSES)


def rates(suspicion: Sequence[float], bad: Sequence[bool], limit: float) -> dict[str, float]:
    """Error rates if all batches that are more suspicious than ``limit`` are rejected."""
    pairs = list(zip((s > limit for s in suspicion), bad, strict=True))
    true_positive = sum(rejected and was_bad for rejected, was_bad in pairs)
    false_positive = sum(rejected and not was_bad for rejected, was_bad in pairs)
    positives = sum(bad)
    fpr = false_positive / max(1, len(bad) - positives)
    fnr = (positives - true_positive) / max(1, positives)
    return {
        "rollback_rate": (true_positive + false_positive) / len(bad),
        "false_positive_rate": fpr,
        "false_negative_rate": fnr,
        "balanced_accuracy": 1 - (fpr + fnr) / 2,
        "precision": true_positive / max(1, true_positive + false_positive),
        "recall": 1 - fnr,
    }


def areas(suspicion: Sequence[float], bad: Sequence[bool], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """ROC-AUC and PR-AUC with 95% intervals, and the base rate.

    Intervals are of a bootstrap over batches. With fewer than :data:`ENOUGH` bad batches there is none of that kind, as
    resampling hardly varies them. If few batches are bad (or good), or the two separate perfectly, the interval of
    ROC-AUC is exact (:func:`editlab.experiments.statistics.roc_area`); ``ROC_AUC_interval`` names the kind.
    """
    scores, labels = ranks(suspicion), torch.tensor(list(bad)).long()
    found: dict[str, Any] = {"base_rate": float(labels.float().mean())}
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(labels), (resamples, len(labels)), generator=draw)
    for name, area in (("ROC_AUC", binary_auroc), ("PR_AUC", binary_average_precision)):
        found[name] = float(area(scores, labels))
        if labels.sum() < ENOUGH:
            continue
        drawn = [float(area(scores[p], labels[p])) for p in picks if 0 < labels[p].sum() < len(p)]
        found[f"{name}_low"], found[f"{name}_high"] = quantiles(drawn)
    exact = roc_area(scores[labels == 1].tolist(), scores[labels == 0].tolist())
    if exact.method == "exact":
        found |= {"ROC_AUC_low": exact.low, "ROC_AUC_high": exact.high}
    return found | {"ROC_AUC_interval": "exact" if exact.method == "exact" else "bootstrap"}


def paired_difference(
    batches: Sequence[Batch], bad: Sequence[bool], gate: str, baseline: str, resamples: int = 1000, seed: int = 0
) -> Difference | None:
    """The difference of two gates' PR-AUC on the same batches, by a paired bootstrap over runs and their batches.

    Each draw takes as many runs as there are, with replacement, and in each of them as many batches as it has, with
    replacement; both gates are read at the same batches. Draws without a bad or without a good batch are left out.
    The interval and p are those of :func:`editlab.experiments.statistics.paired_bootstrap`.

    Args:
        batches: the batches of all runs.
        bad: whether each was bad.
        gate: name in :data:`GATES`.
        baseline: name of the gate that is subtracted.
        resamples: number of draws.
        seed: seed of the draws.

    Returns:
        The difference; None with fewer than :data:`ENOUGH` bad batches.
    """
    labels = torch.tensor(list(bad)).long()
    if labels.sum() < ENOUGH:
        return None
    own, other = (ranks([batch.suspicion[name] for batch in batches]) for name in (gate, baseline))

    def difference(at: Tensor) -> float:
        return float(binary_average_precision(own[at], labels[at]) - binary_average_precision(other[at], labels[at]))

    runs = list(dict.fromkeys(batch.run for batch in batches))
    of_run = [torch.tensor([i for i, batch in enumerate(batches) if batch.run == run]) for run in runs]
    draw = torch.Generator().manual_seed(seed)
    found: list[float] = []
    for _ in range(resamples):
        chosen = [of_run[i] for i in torch.randint(len(of_run), (len(of_run),), generator=draw).tolist()]
        at = torch.cat([some[torch.randint(len(some), (len(some),), generator=draw)] for some in chosen])
        if 0 < labels[at].sum() < len(at):
            found.append(difference(at))
    low, high = quantiles(found)
    ends = [(1 + sum(side * value <= 0 for value in found)) / (1 + len(found)) for side in (1, -1)]
    observed = difference(torch.arange(len(labels)))
    return Difference(observed, low, high, min(1.0, 2 * min(ends)), len(runs), len(batches))


def ranks(values: Sequence[float]) -> Tensor:
    """Ranks of values in [0, 1], equal ones alike: torchmetrics takes values outside of it for logits."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    unique, index = torch.unique(tensor, return_inverse=True)
    return index.float() / max(1, len(unique) - 1)
