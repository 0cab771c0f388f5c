"""ES, PS, NS and their harmonic mean S as torchmetrics classes, and the collection of all numbers of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from editlab.metrics.functional.editing import (
    _prompt_score_compute,
    _prompt_score_update,
    check_kind,
    harmonic_mean,
)
from editlab.metrics.names import SCORED
from editlab.metrics.scores import PromptScores

_COLUMNS = [field.name for field in fields(PromptScores)]


class PromptMetric(Metric):
    """Base of the metrics that average values of prompts per record, then over records.

    The state is the prompts' scores, one list for each column of :class:`PromptScores`, so metrics of the same prompts
    can share it (``compute_groups`` of a ``MetricCollection``). Record numbers must be unique over all updates and
    ranks: prompts with the same number belong to the same record. In a run on several ranks each of them has to call
    ``update`` before ``compute``, with None if it has no prompts.

    Args:
        kind: ``score``, ``accuracy`` or ``magnitude``; see :func:`editlab.metrics.functional.prompt_values`.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown kind.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    prefer_truth = False
    record: list[Tensor]

    def __init__(self, kind: str = "score", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_kind(kind)
        self.kind = kind
        for column in _COLUMNS:
            self.add_state(column, [], dist_reduce_fx="cat")

    def _append(self, scores: PromptScores | None) -> None:
        for name, column in _prompt_score_update(scores).columns().items():
            getattr(self, name).append(column.to(self.device))

    @property
    def scores(self) -> PromptScores:
        """The scores of all prompts so far."""
        if len(self.record) == 0:  # a list; after a synchronisation over ranks a tensor
            return PromptScores.empty()
        return PromptScores(*(dim_zero_cat(getattr(self, column)) for column in _COLUMNS))

    def compute(self) -> Tensor:
        """The mean over records, a float64 scalar; NaN if no prompt could be judged."""
        return _prompt_score_compute(self.scores, self.kind, self.prefer_truth)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of one or several computed values."""
        return self._plot(val, ax)


class EfficacyScore(PromptMetric):
    """Efficacy score (ES): fraction of edits that succeeded on their own edit prompts (arXiv:2202.05262).

    ``update`` takes ``edit``, the scores of ``[n]`` edit prompts; ``compute`` gives a float64 scalar. The function is
    :func:`editlab.metrics.functional.efficacy_score`.

    >>> import torch
    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> metric = EfficacyScore()
    >>> metric.update(scores)
    >>> float(metric.compute())
    0.5
    """

    def update(self, edit: PromptScores | None) -> None:
        """Adds the scores of edit prompts, ``[n]`` rows."""
        self._append(edit)


class ParaphraseScore(PromptMetric):
    """Paraphrase score (PS): the efficacy score on paraphrases, which tells whether an edit generalizes.

    ``update`` takes ``paraphrases``, the scores of ``[n]`` prompts; ``compute`` gives a float64 scalar. The function
    is :func:`editlab.metrics.functional.paraphrase_score`.

    >>> import torch
    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 0]))
    >>> metric = ParaphraseScore("accuracy")
    >>> metric.update(scores)
    >>> float(metric.compute())
    0.5
    """

    def update(self, paraphrases: PromptScores | None) -> None:
        """Adds the scores of paraphrases, ``[n]`` rows."""
        self._append(paraphrases)


class NeighborhoodScore(PromptMetric):
    """Neighborhood score (NS): fraction of neighbor prompts on which the model still prefers their own truth.

    The new and the true target are exchanged. ``update`` takes ``neighbors``, the scores of ``[n]`` prompts;
    ``compute`` gives a float64 scalar. The function is :func:`editlab.metrics.functional.neighborhood_score`.

    >>> import torch
    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> metric = NeighborhoodScore()
    >>> metric.update(scores)
    >>> float(metric.compute())
    0.5
    """

    prefer_truth = True

    def update(self, neighbors: PromptScores | None) -> None:
        """Adds the scores of neighbor prompts, ``[n]`` rows."""
        self._append(neighbors)


class EditMetrics(MetricCollection):
    """All numbers of a group of edits, which keep each column of scores once.

    The names are ``ES, PS, NS, S, accuracy, paraphrase_accuracy, neighbor_accuracy`` and ``ES_magnitude, PS_magnitude,
    NS_magnitude``; S is the harmonic mean of ES, PS and NS. ``update`` takes ``edit``, ``paraphrases`` and
    ``neighbors`` by name, each a :class:`PromptScores` or None.

    Args:
        prefix: start of all names, such as ``retained/``.
        kwargs: arguments of :class:`torchmetrics.Metric`, for each metric.

    >>> import torch
    >>> scores = PromptScores(torch.tensor([-0.1, -3.0]), torch.tensor([-2.0, -1.0]),
    ...                       torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([0, 1]))
    >>> metrics = EditMetrics(prefix="retained/")
    >>> metrics.update(edit=scores, paraphrases=None, neighbors=None)
    >>> sorted(metrics.measured())
    ['retained/ES', 'retained/ES_magnitude', 'retained/accuracy']
    """

    def __init__(self, prefix: str | None = None, **kwargs: Any) -> None:
        classes: dict[str, type[PromptMetric]] = {"ES": EfficacyScore, "PS": ParaphraseScore, "NS": NeighborhoodScore}
        accuracies = {"ES": "accuracy", "PS": "paraphrase_accuracy", "NS": "neighbor_accuracy"}
        names = {name: (name, accuracies[name], f"{name}_magnitude") for name in classes}
        metrics: dict[str, Metric | MetricCollection] = {
            name: classes[first](kind, **kwargs)
            for first, several in names.items()
            for name, kind in zip(several, ("score", "accuracy", "magnitude"), strict=True)
        }
        super().__init__(metrics, prefix=prefix, compute_groups=[list(several) for several in names.values()])

    def compute(self) -> dict[str, Tensor]:
        """Name -> float64 scalar; NaN for what was not evaluated."""
        found = super().compute()
        start, end = self.prefix or "", self.postfix or ""
        found[f"{start}S{end}"] = harmonic_mean([found[f"{start}{name}{end}"] for name in ("ES", "PS", "NS")])
        return found

    def measured(self) -> dict[str, float]:
        """Name -> number, only of what was evaluated; {} before the first update."""
        if not self._member("ES").update_called:
            return {}
        found = self.compute()
        names = [f"{self.prefix or ''}{name}{self.postfix or ''}" for name in SCORED]
        values = {name: float(found[name]) for name in names}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def scores(self) -> dict[str, PromptScores]:
        """The scores of all prompts so far: ``edit``, ``paraphrases`` and ``neighbors``, as far as there are any."""
        members = {"edit": "ES", "paraphrases": "PS", "neighbors": "NS"}
        found = {prompts: self._member(name).scores for prompts, name in members.items()}
        return {prompts: scores for prompts, scores in found.items() if len(scores)}

    def _member(self, name: str) -> PromptMetric:
        member = self.get_submodule(name)  # not self[name], which copies the shared state
        assert isinstance(member, PromptMetric)
        return member
