"""The scores of a group of prompts: what the metrics of edits are computed from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class PromptScores:
    """Scores of one group of prompts (edit prompts, paraphrases or neighbors), one row per prompt.

    Attributes:
        logp_new: float [n], mean log-probability per token of the new target, in nats; -inf where the model's output
            is not finite.
        logp_true: float [n], the same for the true target; NaN where the fact names no truth, and only there.
        hit_new: bool [n], whether the argmax is right at every token of the new target.
        hit_true: bool [n], whether the argmax is right at every token of the true target.
        record: long [n], number of the fact that the prompt belongs to.

    Raises:
        ValueError: if the columns differ in length.

    >>> len(PromptScores.empty())
    0
    """

    logp_new: Tensor
    logp_true: Tensor
    hit_new: Tensor
    hit_true: Tensor
    record: Tensor

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if set(shapes.values()) != {(len(self.record),)}:
            raise ValueError(f"All columns must be vectors of one length, but their shapes are {shapes}.")

    def __len__(self) -> int:
        return len(self.record)

    @classmethod
    def empty(cls) -> PromptScores:
        """Scores of no prompts, with each column's type."""
        return cls(
            torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.bool),
            torch.empty(0, dtype=torch.long),
        )  # fmt: skip

    def columns(self) -> dict[str, Tensor]:
        """Column name -> tensor, without copying."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> PromptScores:
        """The same scores on another device."""
        return PromptScores(**{name: column.to(device) for name, column in self.columns().items()})
