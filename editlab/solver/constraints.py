"""The constraints of a solve: keys, residuals and slacks, with constraints on the same key merged into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DUPLICATE_TOLERANCE = 1e-5
"""Two keys are the same if they differ by less than this fraction of their norm. The number is chosen for float32,
whose rounding depends on how prompts are batched; keys of different facts differ by far more."""


def duplicate_tolerance(rounding: float) -> float:
    """Fraction of its norm by which one key may differ between two forward passes.

    Args:
        rounding: relative error of the model's matrix products (:func:`editlab.lm.precision.rounding`). One key read in
            two bfloat16 passes differs by up to twice that.
    """
    return max(DUPLICATE_TOLERANCE, 2 * rounding)


@dataclass
class Constraints:
    """Constraints ``(W + delta) k_i = v_i`` on an update, each with its slack."""

    keys: Tensor
    """keys of the constraints, [d_k, n]"""
    residuals: Tensor
    """``V - W K`` with the current weights, [d_v, n]"""
    slack: Tensor
    """slack of each constraint, [n], at least 0; 0 is an equality"""
    optional: Tensor | None = None
    """bool [n]: constraints (replayed ones) that are dropped first if the system is ill-conditioned"""

    def __post_init__(self) -> None:
        n = self.keys.shape[1]
        if self.residuals.shape[1] != n or self.slack.shape != (n,):
            raise ValueError(
                f"{n} keys, but residuals {tuple(self.residuals.shape)} and slack {tuple(self.slack.shape)}"
            )
        if bool((self.slack < 0).any()):
            raise ValueError("slack must not be negative")
        if self.optional is None:
            self.optional = torch.zeros(n, dtype=torch.bool, device=self.keys.device)

    def __len__(self) -> int:
        return self.keys.shape[1]

    def to(self, device: torch.device) -> Constraints:
        """The same constraints on another device."""
        assert self.optional is not None
        tensors = (self.keys, self.residuals, self.slack, self.optional)
        if all(tensor.device == device for tensor in tensors):
            return self
        return Constraints(*(tensor.to(device) for tensor in tensors))

    def subset(self, index: Tensor) -> Constraints:
        """The constraints chosen by a boolean mask or by indices."""
        assert self.optional is not None
        return Constraints(self.keys[:, index], self.residuals[:, index], self.slack[index], self.optional[index])

    def merged(self, tolerance: float = DUPLICATE_TOLERANCE) -> Constraints:
        """One constraint for each distinct key.

        Two edits of one subject share their key if their prompts agree up to the subject's last token. Soft constraints
        on one key are equivalent to a single one with the precision-weighted mean of the residuals and the sum of the
        precisions 1/s. Hard constraints on one key cannot all hold, so they become one with the mean of their
        residuals, and soft ones on the same key have no effect. An optional hard constraint would cancel the other
        edits on its key, so it is dropped if there is one that is not optional.

        Args:
            tolerance: keys that differ by less than this fraction of their norm are the same.
        """
        group = _groups(self.keys, tolerance)
        count = int(group.max()) + 1
        if count == len(self):
            return self
        assert self.optional is not None
        needed = torch.zeros(count, dtype=torch.bool, device=group.device)
        needed[group[~self.optional]] = True
        dropped = self.optional & (self.slack == 0) & needed[group]
        hard = (self.slack == 0) & ~dropped
        any_hard = torch.zeros(count, dtype=torch.bool, device=hard.device)
        any_hard[group[hard]] = True
        precision = torch.where(hard, 1.0, 1.0 / self.slack.double().clamp_min(1e-300))
        precision = torch.where((any_hard[group] & ~hard) | dropped, 0.0, precision)
        total = torch.zeros(count, dtype=torch.float64, device=hard.device).index_add_(0, group, precision)
        weight = precision / total[group]
        residuals = torch.zeros(
            self.residuals.shape[0], count, dtype=torch.float64, device=self.residuals.device
        ).index_add_(1, group, self.residuals.double() * weight)
        first = torch.full((count,), len(self), device=group.device).scatter_reduce_(
            0, group, torch.arange(len(self), device=group.device), "amin"
        )
        slack = torch.where(any_hard, torch.zeros_like(total), 1.0 / total)
        return Constraints(self.keys[:, first], residuals, slack, ~needed)


def _groups(keys: Tensor, tolerance: float) -> Tensor:
    """Group number of each key, long [n]; keys [d_k, n] that are the same up to the tolerance share a number."""
    k = keys.double()
    squares = (k * k).sum(0)
    distance = (squares[:, None] + squares[None, :] - 2 * k.T @ k).clamp_min(0)
    same = distance <= tolerance**2 * torch.maximum(squares[:, None], squares[None, :])
    # Rounding in the expansion above is about 1e-16 of the squares, far under the tolerance squared (1e-10 or more).
    first = same.to(torch.uint8).argmax(dim=1)
    return torch.unique(first, return_inverse=True)[1]
