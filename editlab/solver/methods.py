"""Editing methods: each is a metric and a slack for :mod:`editlab.solver.closed_form`, nothing more."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.errors import UserError
from editlab.solver.closed_form import Preservation
from editlab.utils.validation import above_zero


@dataclass(frozen=True)
class Method(ABC):
    """How much is preserved (the metric made of C0), and how hard an edit is asked for (the slack)."""

    def __post_init__(self) -> None:
        weights = ("covariance_weight", "threshold", "ridge")
        above_zero(type(self).__name__, **{name: getattr(self, name, None) for name in weights})
        if not 0 <= self.slack < math.inf:
            raise UserError(f"{type(self).__name__}: the slack is {self.slack}; it must be 0 or above, and finite.")

    @abstractmethod
    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """The preservation metric, from second moments C0 [d_k, d_k] of keys.

        It lies on ``device``, by default that of the moments.
        """

    @property
    @abstractmethod
    def slack(self) -> float:
        """Slack of each edit: 0 asks for equality."""

    @property
    def weight(self) -> float:
        """Lambda: what multiplies C0 in the metric (1 where C0 is not part of it)."""
        return float(getattr(self, "covariance_weight", 1.0))

    @property
    def largest_batch(self) -> int | None:
        """The most facts that one step of this method may edit; None for no limit."""
        return None


@dataclass(frozen=True)
class EMMET(Method):
    """Equality-constrained batch editing (Gupta et al. 2024, arXiv:2403.14236): metric lambda C0, slack gamma."""

    covariance_weight: float = 1.0
    """lambda. With gamma = 0 it matters only beside other terms of the metric (``preserve_prompt_tokens``)."""
    gamma: float = 0.0
    """0 is the paper's hard equality; above 0 it regularizes the Gram matrix, and the method *is* MEMIT with weight
    gamma * lambda."""
    ridge: float = 1e-6
    """Share of C0's mean eigenvalue that is added to its diagonal."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """Gamma."""
        return self.gamma


@dataclass(frozen=True)
class ROME(Method):
    """One fact a step by equality (Meng et al. 2022, arXiv:2202.05262): EMMET with a batch of one."""

    covariance_weight: float = 1.0
    """lambda; see :class:`EMMET`."""
    ridge: float = 1e-6
    """Share of C0's mean eigenvalue that is added to its diagonal."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """0: the new fact holds exactly."""
        return 0.0

    @property
    def largest_batch(self) -> int | None:
        """1."""
        return 1


@dataclass(frozen=True)
class MEMIT(Method):
    """Least-squares batch editing (Meng et al. 2022, arXiv:2210.07229): metric lambda C0, slack 1."""

    covariance_weight: float = 15000.0
    """lambda, ``mom2_update_weight`` of the reference code."""
    ridge: float = 1e-6
    """Share of C0's mean eigenvalue that is added to its diagonal."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class AlphaEdit(Method):
    """Edits inside the null space of C0 (Fang et al. 2024, arXiv:2410.02355).

    The metric is ``l2`` times the identity there, and infinite elsewhere; the paper adds past keys to it, which is
    a memory's business, not the method's.
    """

    threshold: float = 2e-2
    """Eigenvalues of C0 under this span the null space, in C0's own units."""
    l2: float = 1.0
    """Weight of the L2 term on the update; slack in the closed form."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """The identity on C0's null space."""
        return Preservation.null_space(moments, self.threshold, device)

    @property
    def slack(self) -> float:
        """``l2``."""
        return self.l2
