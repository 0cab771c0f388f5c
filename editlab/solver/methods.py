"""Editing methods: each is a metric C and a slack for the one closed form of :mod:`editlab.solver.closed_form`.

With keys K, residuals R and slack s the update is ``R (K^T C^-1 K + s I)^-1 K^T C^-1``. A method only defines C
and s; values, memory and everything around the solve do not depend on it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from editlab.errors import UserError
from editlab.solver.base import EditMethod
from editlab.solver.preservation import Preservation
from editlab.utils.validation import above_zero


@dataclass(frozen=True)
class Method(EditMethod):
    """A method of the closed form: a metric (how much is preserved) and a slack (how strictly an edit is enforced)."""

    solves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        weights = ("covariance_weight", "threshold", "ridge")
        above_zero(type(self).__name__, **{name: getattr(self, name, None) for name in weights})
        if not 0 <= self.slack < math.inf:
            raise UserError(f"{type(self).__name__}: the slack is {self.slack}; it must be 0 or above, and finite.")

    @abstractmethod
    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the preservation metric for second moments C0 of keys, [d_k, d_k], on ``device``; default: theirs."""

    @property
    @abstractmethod
    def slack(self) -> float:
        """Slack of each edit: 0 enforces equality, larger values trade the edit against preservation."""

    @property
    def weight(self) -> float:
        """Lambda, the factor of C0 in the metric; 1 if C0 is not part of it."""
        return float(getattr(self, "covariance_weight", 1.0))


@dataclass(frozen=True)
class EMMET(Method):
    """Equality-constrained batch editing (Gupta et al. 2024, arXiv:2403.14236): metric ``lambda C0``.

    The authors' code adds a small ridge to the Gram matrix ``K^T C^-1 K``, which is a slack in the closed form. If
    the metric is ``lambda C0`` alone, slack s gives the same update as :class:`MEMIT` at weight ``s * lambda``; with
    slack 1 the two are one method, so EMMET accepts only smaller ones.

    Raises:
        UserError: The slack is 1 or above.
    """

    covariance_weight: float = 1.0
    """Lambda. At slack 0 it only matters relative to other terms of the metric: context keys and past keys."""
    gram_ridge: float = 0.1
    """Ridge on the Gram matrix (``emmet_lambda`` of the authors' code, whose value is 0.1); 0 is exact equality."""
    ridge: float = 1e-6
    """Fraction of C0's mean eigenvalue that is added to its diagonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gram_ridge >= 1:
            raise UserError(
                f"EMMET.gram_ridge is {self.gram_ridge}: from 1 on the method is MEMIT, not equality: use MEMIT with "
                f"covariance_weight {self.gram_ridge * self.covariance_weight:g}."
            )

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """The ridge on the Gram matrix."""
        return self.gram_ridge


@dataclass(frozen=True)
class ROME(Method):
    """Rank-one editing by equality (Meng et al. 2022, arXiv:2202.05262): EMMET with one fact a step and no slack."""

    covariance_weight: float = 1.0
    """Lambda; see :class:`EMMET`."""
    ridge: float = 1e-6
    """Fraction of C0's mean eigenvalue that is added to its diagonal."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """Slack 0, so that the new fact holds exactly."""
        return 0.0

    @property
    def largest_batch(self) -> int | None:
        """A limit of one fact a step."""
        return 1


@dataclass(frozen=True)
class MEMIT(Method):
    """Least-squares batch editing (Meng et al. 2023, arXiv:2210.07229, eq. 14): metric ``lambda C0``, slack 1."""

    covariance_weight: float = 15000.0
    """Lambda, ``mom2_update_weight`` of the authors' code."""
    ridge: float = 1e-6
    """Fraction of C0's mean eigenvalue that is added to its diagonal."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device)

    @property
    def slack(self) -> float:
        """Slack 1: an edit weighs as much as a preserved key of weight 1."""
        return 1.0


@dataclass(frozen=True)
class AlphaEdit(Method):
    """Edits inside the null space of C0 (Fang et al. 2024, arXiv:2410.02355).

    The metric is ``l2`` times the identity inside the null space and infinite outside it. The paper also adds the keys
    of past edits to the metric: here a consolidated memory does that, for any method.
    """

    threshold: float = 2e-2
    """Eigenvectors of C0 whose eigenvalue lies below this span the null space; in C0's own units."""
    l2: float = 1.0
    """Weight of the L2 term on the update, which is the slack in the closed form."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the identity on C0's null space."""
        return Preservation.null_space(moments, self.threshold, device)

    @property
    def slack(self) -> float:
        """The weight of the L2 term."""
        return self.l2
