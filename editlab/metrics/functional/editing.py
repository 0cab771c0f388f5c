"""ES, PS and NS as functions: the mean over records of the mean over each record's prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editlab.metrics.scores import PromptScores

KINDS = ("score", "accuracy", "magnitude")


def record_means(values: Tensor, record: Tensor) -> Tensor:
    """Mean of each record's rows, sorted by record number; rows that are NaN do not count.

    Args:
        values: float [n]; NaN where a prompt could not be judged.
        record: long [n], the record of each row.

    Returns:
        float64 [records that have at least one row that is not NaN].

    >>> record_means(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 2])).tolist()
    [1.0, 0.5]
    """
    judged = ~values.isnan()
    numbers, index = torch.unique(record[judged], return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64, device=values.device)
    sums.index_add_(0, index, values[judged].double())
    return sums / torch.bincount(index, minlength=len(numbers))


def check_kind(kind: str) -> None:
    """Checks the name of a kind of value.

    Raises:
        ValueError: if ``kind`` is not one of :data:`KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(KINDS)}.")


def prompt_values(scores: PromptScores, kind: str, *, prefer_truth: bool = False) -> Tensor:
    """The value of each prompt.

    Args:
        scores: the prompts.
        kind: ``score`` is 1 where P(new) > P(true); ``accuracy`` is 1 where the argmax is right at every token of the
            target; ``magnitude`` is P(new) - P(true). P(x) is the exponential of the mean log-probability per token.
        prefer_truth: exchange the new and the true target, as neighbors require.

    Returns:
        float [n]; NaN where the fact names no truth and the kind (or ``prefer_truth``) needs one.

    Raises:
        ValueError: for an unknown kind.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> prompt_values(scores, "score").tolist()
    [1.0, 0.0]
    >>> prompt_values(scores, "score", prefer_truth=True).tolist()
    [0.0, 1.0]
    """
    check_kind(kind)
    no_truth = scores.logp_true.isnan()
    if kind == "accuracy":
        hits = (scores.hit_true if prefer_truth else scores.hit_new).float()
        return hits.masked_fill(no_truth, float("nan")) if prefer_truth else hits
    wanted, other = scores.logp_new, scores.logp_true
    if prefer_truth:
        wanted, other = other, wanted
    if kind == "magnitude":
        return wanted.exp() - other.exp()
    return (wanted > other).float().masked_fill(no_truth, float("nan"))


def _prompt_score_update(scores: PromptScores | None) -> PromptScores:
    """The rows that an update adds; None stands for no prompts."""
    return PromptScores.empty() if scores is None else scores


def _prompt_score_compute(scores: PromptScores, kind: str, prefer_truth: bool) -> Tensor:
    """The mean over records, a float64 scalar on the CPU.

    It is computed on the CPU because some accelerators have no float64, and because their sums have no fixed order.
    """
    scores = scores.to("cpu")
    return record_means(prompt_values(scores, kind, prefer_truth=prefer_truth), scores.record).mean()


def efficacy_score(edit: PromptScores, kind: str = "score") -> Tensor:
    """Efficacy score (ES): fraction of edits that succeeded on their own edit prompts.

    Args:
        edit: scores of the edit prompts, ``[n]`` rows.
        kind: ``score``, ``accuracy`` or ``magnitude``, see :func:`prompt_values`.

    Returns:
        float64 scalar; NaN if no prompt could be judged.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> float(efficacy_score(scores))
    0.5
    """
    return _prompt_score_compute(_prompt_score_update(edit), kind, prefer_truth=False)


def paraphrase_score(paraphrases: PromptScores, kind: str = "score") -> Tensor:
    """Paraphrase score (PS): the efficacy score on paraphrases of the edit prompts.

    Args:
        paraphrases: scores of the paraphrases, ``[n]`` rows; those of one fact share its record number.
        kind: ``score``, ``accuracy`` or ``magnitude``, see :func:`prompt_values`.

    Returns:
        float64 scalar; NaN if no prompt could be judged.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 0]))
    >>> float(paraphrase_score(scores, "accuracy"))
    0.5
    """
    return _prompt_score_compute(_prompt_score_update(paraphrases), kind, prefer_truth=False)


def neighborhood_score(neighbors: PromptScores, kind: str = "score") -> Tensor:
    """Neighborhood score (NS): fraction of neighbor prompts on which the model still prefers their own truth.

    Args:
        neighbors: scores of the neighbor prompts, ``[n]`` rows; those of one fact share its record number.
        kind: ``score``, ``accuracy`` or ``magnitude``, with the true and the new target exchanged.

    Returns:
        float64 scalar; NaN if no prompt could be judged.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> float(neighborhood_score(scores))
    0.5
    """
    return _prompt_score_compute(_prompt_score_update(neighbors), kind, prefer_truth=True)


def harmonic_mean(values: Sequence[Tensor | float]) -> Tensor:
    """N / sum(1 / value), a float64 scalar; 0 if any value is 0, NaN if any is NaN.

    >>> round(float(harmonic_mean([1.0, 0.5, 0.5])), 4)
    0.6
    """
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    return len(values) / (1 / stacked).sum()
