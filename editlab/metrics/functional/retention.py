"""Retention of past edits by their age, as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from editlab.metrics.functional.editing import prompt_values, record_means
from editlab.metrics.scores import PromptScores


def _retention_by_age_update(edit: PromptScores, age: Tensor) -> tuple[PromptScores, Tensor]:
    if age.shape != edit.record.shape:
        raise ValueError(f"There are {len(edit)} edits, but the ages have shape {tuple(age.shape)}: give one per edit.")
    return edit, age


def _retention_by_age_compute(edit: PromptScores, age: Tensor, bins: int, kind: str) -> Tensor:
    """Mean of each age bin, newest first; on the CPU (see :mod:`editlab.metrics.functional.editing`)."""
    edit, age = edit.to("cpu"), age.cpu().double()
    values = prompt_values(edit, kind)
    judged = ~values.isnan()  # a fact may name no truth
    ages = record_means(age[judged], edit.record[judged])
    order = ages.argsort(stable=True)
    means = [part.mean() for part in record_means(values, edit.record)[order].tensor_split(bins) if len(part)]
    return torch.stack(means) if means else torch.empty(0, dtype=torch.float64)


def retention_by_age(edit: PromptScores, age: Tensor, bins: int = 4, kind: str = "accuracy") -> Tensor:
    """Fraction of past edits that still hold, by their age.

    Args:
        edit: scores of the edit prompts of past edits, ``[n]`` rows.
        age: long [n], number of edits made since.
        bins: number of bins of equal size into which the edits are sorted by age.
        kind: ``score``, ``accuracy`` or ``magnitude``.

    Returns:
        float64 [at most ``bins``], newest first; there are fewer bins if there are fewer edits.

    Raises:
        ValueError: if the shapes differ.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> retention_by_age(scores, torch.tensor([2, 1]), bins=2).tolist()
    [0.0, 1.0]
    """
    return _retention_by_age_compute(*_retention_by_age_update(edit, age), bins, kind)
