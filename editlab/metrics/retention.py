"""Retention: what is left of past edits, also by their age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from editlab.metrics.editing import EfficacyScore
from editlab.metrics.functional import judge, per_record
from editlab.metrics.scores import PromptScores


class Retention(EfficacyScore):
    """Share of past edits that still hold, over all of them and by age.

    Args:
        kind: ``score``, ``accuracy`` or ``magnitude``.
        age_bins: parts of equal size that the edits are sorted into by age, the newest first; 0 for none.
    """

    def __init__(self, kind: str = "score", age_bins: int = 0, **kwargs: Any) -> None:
        super().__init__(kind, **kwargs)
        if age_bins < 0:
            raise ValueError(f"age_bins is {age_bins}: it must not be negative")
        self.age_bins = age_bins
        self.age: list[Tensor]
        self.add_state("age", [], dist_reduce_fx="cat")

    def update(self, scores: PromptScores, age: Tensor | None = None) -> None:
        """Adds the edit prompts of past edits.

        Args:
            scores: one row an edit.
            age: long [n]: edits made since; needed for bins.
        """
        super().update(scores)
        if age is None:
            if self.age_bins:
                raise ValueError("age_bins needs the age of each edit")
            age = torch.zeros_like(scores.record)
        if age.shape != scores.record.shape:
            raise ValueError(f"{len(scores)} edits, but ages {tuple(age.shape)}")
        self.age.append(age.to(self.device))

    def by_age(self) -> list[Tensor]:
        """Each age bin's mean, newest first; fewer bins where there are fewer edits."""
        if len(self.record) == 0 or not self.age_bins:
            return []
        scores, age = self.scores, dim_zero_cat(self.age).double()
        judged = ~judge(scores, self.kind).isnan()  # as of the records' own values: a fact may have no truth
        ages = per_record(age[judged], scores.record[judged])
        order = ages.argsort(stable=True)
        return [self.records()[part].mean() for part in order.tensor_split(self.age_bins) if len(part)]
