"""Retention of past edits by their age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from editlab.metrics.editing import PromptMetric
from editlab.metrics.functional.retention import _retention_by_age_compute, _retention_by_age_update
from editlab.metrics.scores import PromptScores


class RetentionByAge(PromptMetric):
    """Fraction of past edits that still hold, by their age.

    ``update`` takes ``edit``, the scores of ``[n]`` edit prompts, and ``age``, long [n], the number of edits made
    since. ``compute`` gives float64 [at most ``bins``], newest first. The function is
    :func:`editlab.metrics.functional.retention_by_age`.

    Args:
        bins: number of bins of equal size into which the edits are sorted by age.
        kind: ``score``, ``accuracy`` or ``magnitude``.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown kind, fewer than one bin, or an update whose shapes differ.

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> metric = RetentionByAge(bins=2)
    >>> metric.update(scores, torch.tensor([2, 1]))
    >>> metric.compute().tolist()
    [0.0, 1.0]
    """

    age: list[Tensor]

    def __init__(self, bins: int = 4, kind: str = "accuracy", **kwargs: Any) -> None:
        super().__init__(kind, **kwargs)
        if bins < 1:
            raise ValueError(f"bins is {bins}: it must be at least 1.")
        self.bins = bins
        self.add_state("age", [], dist_reduce_fx="cat")

    def update(self, edit: PromptScores, age: Tensor) -> None:
        """Adds past edits, ``[n]`` rows, and the number of edits made since each of them, long [n]."""
        edit, age = _retention_by_age_update(edit, age)
        self._append(edit)
        self.age.append(age.to(self.device))

    def compute(self) -> Tensor:
        """Mean of each bin, float64 [at most ``bins``], newest first; fewer bins if there are fewer edits."""
        age = dim_zero_cat(self.age) if len(self.age) else torch.empty(0)
        return _retention_by_age_compute(self.scores, age, self.bins, self.kind)
