"""What metrics of edits are computed from: the scores of a group of prompts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class PromptScores:
    """Scores of one group of prompts (edit prompts, paraphrases or neighbors), one row a prompt.

    Raises:
        ValueError: where the columns differ in length.
    """

    logp_new: Tensor
    """float [n]: mean log-probability per token of the new target, in nats; -inf where the model gives no number"""
    logp_true: Tensor
    """float [n]: the same of the truth; NaN where the fact names none, and only there"""
    hit_new: Tensor
    """bool [n]: the argmax is right at every token of the new target"""
    hit_true: Tensor
    """bool [n]: the argmax is right at every token of the truth"""
    record: Tensor
    """long [n]: which record the prompt belongs to"""

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if set(shapes.values()) != {(len(self.record),)}:
            raise ValueError(f"all columns must be vectors of one length, but are {shapes}")

    def __len__(self) -> int:
        return len(self.record)

    @classmethod
    def cat(cls, parts: list[PromptScores]) -> PromptScores:
        """Several groups as one; record numbers are kept, so the same number is the same record."""
        return cls(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(cls)))

    def to(self, device: torch.device | str) -> PromptScores:
        """The same on a device."""
        return PromptScores(*(getattr(self, field.name).to(device) for field in fields(self)))
