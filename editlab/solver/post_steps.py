"""Post-steps: what is done with an update between its solve and the weights, to spare the rest of the model.

Each is a small class that gets an update and the weight that it is for, and returns the update to apply. A recipe lists
them in ``model.post_steps``, and they are applied in that order. All work on float64 matrices in mathematical
orientation, [d_v, d_k], whichever way the module stores its weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from editlab.errors import UserError
from editlab.utils.validation import decays, fractions, one_of


@dataclass
class EditedWeight:
    """A weight before an update is applied to it, with what post-steps have computed from its original."""

    original: Tensor
    """the weight before any edit, float64 [d_v, d_k]"""
    total: Tensor
    """the sum of earlier updates, float64 [d_v, d_k]"""
    computed: dict[str, Any] = field(default_factory=dict)
    """what depends on the original alone, by name; kept from batch to batch"""

    @property
    def current(self) -> Tensor:
        """The weight with earlier updates, [d_v, d_k]."""
        return self.original + self.total

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed at the first call with this name."""
        if name not in self.computed:
            self.computed[name] = compute()
        return self.computed[name]


class PostStep(ABC):
    """What is done with the update of one layer before it is added to the weight."""

    @abstractmethod
    def apply(self, update: Tensor, weight: EditedWeight) -> Tensor:
        """Return the update to apply for a solved update, both float64 [d_v, d_k]."""


def apply_all(steps: Sequence[PostStep], update: Tensor, weight: EditedWeight) -> Tensor:
    """Applies post-steps one after the other.

    Args:
        steps: the post-steps, in their order.
        update: the solved update, float64 [d_v, d_k].
        weight: the weight that it is for.

    Returns:
        The update to apply, float64 [d_v, d_k].
    """
    for step in steps:
        update = step.apply(update, weight)
    return update


@dataclass(frozen=True)
class SPHERE(PostStep):
    """Takes a fraction of the update out of the weight's principal directions (Liu et al. 2025, arXiv:2510.01172).

    The rows of the weight are scaled to length 1. U spans the leading eigenvectors of their second moments in key
    space, just enough of them for more than ``ratio`` of the sum of eigenvalues. The update becomes::

        delta (I - strength U U^T)

    The directions are those of the original weight, as the paper's text says; its code takes those of the weight as
    edited so far, which ``of: current`` does at the price of one singular value decomposition a batch.

    Raises:
        UserError: A setting is out of range.
    """

    ratio: float = 0.5
    """Fraction of the sum of eigenvalues that the principal directions exceed (``beta_hse`` of the authors' code)."""
    strength: float = 0.5
    """Fraction of the update's part along these directions that is removed (``alpha``); the authors use 0.5 with
    AlphaEdit and 0.8 with MEMIT."""
    of: str = "original"
    """``original`` or ``current``: the weight whose directions they are."""

    def __post_init__(self) -> None:
        fractions("SPHERE", ratio=self.ratio)
        decays("SPHERE", strength=self.strength)
        one_of("SPHERE", ("original", "current"), of=self.of)

    def apply(self, update: Tensor, weight: EditedWeight) -> Tensor:
        """Return ``delta (I - strength U U^T)``."""
        if self.of == "current":
            directions = self.directions(weight.current)
        else:
            directions = weight.once(f"SPHERE {self.ratio}", lambda: self.directions(weight.original))
        return update - self.strength * (update @ directions) @ directions.T

    def directions(self, weight: Tensor) -> Tensor:
        """U, the principal directions [d_k, r] of a weight [d_v, d_k]."""
        rows = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-300)
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        count = int((shares <= self.ratio).sum()) + 1
        return vectors[:count].T.contiguous()


@dataclass(frozen=True)
class REVIVE(PostStep):
    """Removes what would disturb the weight's dominant singular directions (Zhang et al. 2026, arXiv:2601.11042).

    With the original weight ``W0 = sum_i sigma_i u_i v_i^T``, the update has the coefficients ``u_i^T delta v_j`` in
    its spectral basis. Those with i or j among the first r are set to 0, so that each of the first r triplets
    (sigma_i, u_i, v_i) is still one of the edited weight::

        (I - U_r U_r^T) delta (I - V_r V_r^T)

    r is the smallest number whose squared singular values are at least the fraction ``energy`` of the sum. The paper's
    text was not at hand: that both sides are protected, and that the fraction is of squares, is this implementation's
    reading of its abstract.

    Raises:
        UserError: The fraction is out of range.
    """

    energy: float = 0.5
    """Fraction of the sum of squared singular values that is protected."""

    def __post_init__(self) -> None:
        decays("REVIVE", energy=self.energy)
        if self.energy == 1:
            raise UserError("REVIVE.energy is 1.0: the whole weight would be protected from its edits; lower it.")

    def apply(self, update: Tensor, weight: EditedWeight) -> Tensor:
        """Return the update without its part in the protected rows and columns of the spectral basis."""
        left, right = weight.once(f"REVIVE {self.energy}", lambda: self.protected(weight.original))
        update = update - left @ (left.T @ update)
        return update - (update @ right) @ right.T

    def protected(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The dominant left and right singular vectors of a weight, [d_v, r] and [d_k, r]."""
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        count = min(int((shares < self.energy).sum()) + 1, len(values))
        return left[:, :count].contiguous(), right[:count].T.contiguous()


@dataclass(frozen=True)
class PRUNE(PostStep):
    """Restrains the update's large singular values (Ma et al. 2025, arXiv:2405.16821).

    A singular value s of the update above the weight's largest one, s_max, becomes::

        log_base(s) - log_base(s_max) + s_max

    The paper restrains the sum of all updates once, after the last edit. With ``of: sum`` (the default) the sum is
    restrained after each batch: what is applied is the restrained sum less the sum before. With ``of: update`` each
    batch's own update is, against the weight as edited so far, as in the code of OTE-SE (arXiv:2605.26670).

    Raises:
        UserError: A setting is out of range.
    """

    base: float = math.e
    """Base of the logarithm (``alpha`` of the paper), above 1; the authors' code offers e, 2, 1.5 and 1.2."""
    of: str = "sum"
    """``sum`` or ``update``: what is restrained."""

    def __post_init__(self) -> None:
        one_of("PRUNE", ("sum", "update"), of=self.of)
        if not 1 < self.base < math.inf:
            raise UserError(f"PRUNE.base is {self.base}: the base of a logarithm must be above 1, and finite.")

    def apply(self, update: Tensor, weight: EditedWeight) -> Tensor:
        """Return the update whose singular values, or those of the sum with it, are restrained."""
        if self.of == "update":
            return self.restrained(update, _largest(weight.current))
        limit = weight.once("PRUNE", lambda: _largest(weight.original))
        return self.restrained(weight.total + update, limit) - weight.total

    def restrained(self, matrix: Tensor, limit: Tensor) -> Tensor:
        """A matrix with its singular values above ``limit`` restrained; the others stay as they are."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        above = values > limit
        if not bool(above.any()):
            return matrix
        less = values[above] - (values[above] / limit).log() / math.log(self.base) - limit
        return matrix - (left[:, above] * less) @ right[above]


def _largest(matrix: Tensor) -> Tensor:
    """The largest singular value."""
    return torch.linalg.matrix_norm(matrix, 2)


@dataclass(frozen=True)
class RECT(PostStep):
    """Keeps only the elements that change their weight the most, relatively (Gu et al. 2024, arXiv:2401.04700).

    Of the elements ``|delta_ij / W_ij|``, with W as edited so far, the largest fraction is kept; the others are set to
    0.

    Raises:
        UserError: The fraction is out of range.
    """

    fraction: float = 0.2
    """Fraction of the update's elements to keep (top-k% of the paper); its authors' code keeps 20%."""

    def __post_init__(self) -> None:
        decays("RECT", fraction=self.fraction)

    def apply(self, update: Tensor, weight: EditedWeight) -> Tensor:
        """Return the update with all but its relatively largest elements set to 0; equal ones are kept together."""
        tiny = torch.finfo(update.dtype).tiny
        change = update.abs() / weight.current.abs().clamp_min(tiny)
        dropped = change.numel() - math.ceil(self.fraction * change.numel())
        if not dropped:
            return update
        limit = change.flatten().kthvalue(dropped + 1).values
        return torch.where(change >= limit, update, 0.0)
