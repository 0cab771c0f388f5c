"""ES, PS, NS and their harmonic mean S as torchmetrics classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from editlab.metrics.functional import bootstrap_interval, harmonic_mean, judge, per_record
from editlab.metrics.scores import PromptScores

_COLUMNS = [field.name for field in fields(PromptScores)]


class _PromptMetric(Metric):
    """Keeps prompts' scores and averages them per record, then over records.

    Record numbers must be unique over all updates: the prompts of one number are one record's.

    Args:
        kind: ``score``, ``accuracy`` or ``magnitude``; see :func:`editlab.metrics.functional.judge`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    prefer_truth = False
    record: list[Tensor]

    def __init__(self, kind: str = "score", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        judge(_empty(), kind)  # raises for a kind that there is not
        self.kind = kind
        for column in _COLUMNS:
            self.add_state(column, [], dist_reduce_fx="cat")

    def update(self, scores: PromptScores) -> None:
        """Adds prompts, [n] rows."""
        for column in _COLUMNS:
            getattr(self, column).append(getattr(scores, column).to(self.device))

    @property
    def scores(self) -> PromptScores:
        """All prompts so far."""
        if len(self.record) == 0:  # a list, or after a gathering over ranks a tensor
            return _empty()
        return PromptScores(*(dim_zero_cat(getattr(self, column)) for column in _COLUMNS))

    def records(self) -> Tensor:
        """float64 [records]: each record's own value, by ascending record number."""
        scores = self.scores
        return per_record(judge(scores, self.kind, prefer_truth=self.prefer_truth), scores.record)

    def compute(self) -> Tensor:
        """The mean over records, a float64 scalar; NaN where no prompt could be judged."""
        return self.records().mean()

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean over records."""
        return bootstrap_interval(self.records(), confidence)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of one or more computed values."""
        return self._plot(val, ax)


class EfficacyScore(_PromptMetric):
    """ES: how many edits took, on the edit prompts themselves (Meng et al. 2022, arXiv:2202.05262).

    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> metric = EfficacyScore()
    >>> metric.update(scores)
    >>> float(metric.compute())
    0.5
    """


class ParaphraseScore(_PromptMetric):
    """PS: the same on paraphrases of the edit prompts: whether the edit generalizes."""


class NeighborhoodScore(_PromptMetric):
    """NS: how many neighbors kept their truth: whether the edit is specific. New and true change places."""

    prefer_truth = True


class EditMetrics:
    """All numbers of a group of edits under the names that a run's summary uses.

    ``ES, PS, NS, S, accuracy, paraphrase_accuracy, neighbor_accuracy`` and the magnitudes ``ES_magnitude,
    PS_magnitude, NS_magnitude``. What was not evaluated is absent from the result, not zero.

    Args:
        kwargs: of torchmetrics, for each of them.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.metrics: dict[str, _PromptMetric] = {
            "ES": EfficacyScore("score", **kwargs),
            "PS": ParaphraseScore("score", **kwargs),
            "NS": NeighborhoodScore("score", **kwargs),
            "accuracy": EfficacyScore("accuracy", **kwargs),
            "paraphrase_accuracy": ParaphraseScore("accuracy", **kwargs),
            "neighbor_accuracy": NeighborhoodScore("accuracy", **kwargs),
            "ES_magnitude": EfficacyScore("magnitude", **kwargs),
            "PS_magnitude": ParaphraseScore("magnitude", **kwargs),
            "NS_magnitude": NeighborhoodScore("magnitude", **kwargs),
        }

    def update(
        self,
        edit: PromptScores,
        paraphrases: PromptScores | None = None,
        neighbors: PromptScores | None = None,
    ) -> None:
        """Adds the prompts of some records."""
        given = {EfficacyScore: edit, ParaphraseScore: paraphrases, NeighborhoodScore: neighbors}
        for metric in self.metrics.values():
            scores = given[type(metric)]
            if scores is not None:
                metric.update(scores)

    def compute(self) -> dict[str, Tensor]:
        """Name -> float64 scalar, of what was evaluated."""
        found = {name: metric.compute() for name, metric in self.metrics.items() if metric.update_called}
        found = {name: value for name, value in found.items() if not value.isnan()}
        if {"ES", "PS", "NS"} <= set(found):
            found["S"] = harmonic_mean([found[name] for name in ("ES", "PS", "NS")])
        return found

    def reset(self) -> None:
        """Forgets all prompts."""
        for metric in self.metrics.values():
            metric.reset()


def _empty() -> PromptScores:
    none = torch.empty(0)
    return PromptScores(none, none, none.bool(), none.bool(), none.long())
