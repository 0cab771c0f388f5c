"""What a model writes after a prompt, scored against the names that count as right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from editlab.metrics.functional.answers import (
    AnswerKind,
    _answer_score_update,
    case_score,
    check_answer_kind,
)


class CaseScore(Metric):
    """Mean over cases of the values of their prompts: of their mean, or of the best one.

    ``update`` takes ``values``, float [n], and ``record``, long [n], the number of each prompt's case; ``compute``
    gives a float64 scalar, NaN for no prompts. The function is :func:`editlab.metrics.functional.case_score`.

    Args:
        any_prompt: a case counts by its best prompt, as in MQuAKE (arXiv:2305.14795), where a case is right if any of
            its multi-hop questions is answered; otherwise by the mean of its prompts.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    >>> metric = CaseScore(any_prompt=True)
    >>> metric.update(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 2]))
    >>> float(metric.compute())
    0.5
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    values: list[Tensor]
    record: list[Tensor]

    def __init__(self, any_prompt: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.any_prompt = any_prompt
        for column in ("values", "record"):
            self.add_state(column, [], dist_reduce_fx="cat")

    def update(self, values: Tensor, record: Tensor) -> None:
        """Adds prompts: their values, float [n], and the numbers of their cases, long [n].

        Raises:
            ValueError: if the shapes differ.
        """
        if values.shape != record.shape:
            raise ValueError(
                f"The values have shape {tuple(values.shape)} and the record numbers {tuple(record.shape)}: give one "
                "per prompt."
            )
        # float32, because some accelerators have no float64
        self.values.append(values.to(self.device, torch.float32))
        self.record.append(record.to(self.device))

    def compute(self) -> Tensor:
        """The mean over cases, a float64 scalar; NaN if there was no prompt."""
        if not len(self.record):  # a list; after a synchronisation over ranks a tensor
            return torch.tensor(float("nan"), dtype=torch.float64)
        return case_score(dim_zero_cat(self.values), dim_zero_cat(self.record), self.any_prompt)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure of one or several computed values."""
        return self._plot(val, ax)


class AnswerScore(CaseScore):
    """Score of generated texts: whether they contain or are the right answer, or how many words they share with it.

    ``update`` takes ``texts``, what the model wrote after each of ``[n]`` prompts, ``names``, for each prompt the right
    answer and its aliases, and ``record``, long [n], the number of the fact that the prompt belongs to; ``compute``
    gives a float64 scalar, NaN for no prompts. The function is :func:`editlab.metrics.functional.answer_score`.

    Args:
        kind: ``contains``, ``exact`` or ``f1``, the best over the names after SQuAD's normalisation; see
            :class:`editlab.metrics.functional.answers.AnswerScores`.
        any_prompt: a fact counts by its best prompt; otherwise by the mean of its prompts.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown kind, a prompt without a name, or an update whose lengths differ.

    >>> metric = AnswerScore("f1")
    >>> metric.update(["Rome, the capital of Italy."], [["Rome"]], torch.tensor([0]))
    >>> round(float(metric.compute()), 4)
    0.4
    """

    def __init__(self, kind: AnswerKind = "contains", any_prompt: bool = False, **kwargs: Any) -> None:
        super().__init__(any_prompt, **kwargs)
        check_answer_kind(kind)
        self.kind = kind

    def update(  # type: ignore[override]
        self, texts: Iterable[str], names: Iterable[Sequence[str]], record: Tensor
    ) -> None:
        """Adds generated texts, the names that count as right for each, and the numbers of their facts, long [n]."""
        super().update(*_answer_score_update(texts, names, record, self.kind))
