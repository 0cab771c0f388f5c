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
from editlab.utils.validation import above_zero, at_least_one, not_negative


@dataclass(frozen=True)
class Method(EditMethod):
    """A method of the closed form: a metric (how much is preserved) and a slack (how strictly an edit is enforced)."""

    solves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        weights = ("covariance_weight", "threshold", "ridge")
        above_zero(type(self).__name__, **{name: getattr(self, name, None) for name in weights})
        not_negative(type(self).__name__, mu=getattr(self, "mu", None))
        if not 0 <= self.slack < math.inf:
            raise UserError(f"{type(self).__name__}: the slack is {self.slack}; it must be 0 or above, and finite.")

    @abstractmethod
    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the preservation metric for second moments C0 of keys on ``device``; default: theirs.

        C0 is [d_k, d_k], or has a block for each expert, [experts, features, features].
        """

    @property
    @abstractmethod
    def slack(self) -> float:
        """Slack of each edit: 0 enforces equality, larger values trade the edit against preservation."""

    @property
    def weight(self) -> float:
        """Lambda, the factor of C0 in the metric; 1 if C0 is not part of it."""
        return float(getattr(self, "covariance_weight", 1.0))

    def refreshed(self, moments: Tensor, past: Tensor, edits: int, device: torch.device | None = None) -> Preservation:
        """Return the metric without past keys, as it has to be after some edits; by default it stays what it was.

        Args:
            moments: C0, [d_k, d_k].
            past: the sum of ``k k^T`` over past keys and, with their weight, the context keys that a memory keeps,
                [d_k, d_k].
            edits: number of edits whose keys are in that sum.
            device: as for :meth:`preservation`.
        """
        return self.preservation(moments, device)


@dataclass(frozen=True)
class EMMET(Method):
    """Equality-constrained batch editing (Gupta et al. 2024, arXiv:2403.14236): metric ``lambda C0 + mu I``.

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
    mu: float = 0.0
    """Weight of the identity in the metric, in the units of a key's square: each past or present key is worth 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gram_ridge >= 1:
            raise UserError(
                f"EMMET.gram_ridge is {self.gram_ridge}: from 1 on the method is MEMIT, not equality: use MEMIT with "
                f"covariance_weight {self.gram_ridge * self.covariance_weight:g}"
                f"{f' and mu {self.gram_ridge * self.mu:g}' if self.mu else ''}."
            )

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0 + mu I``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device, self.mu)

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
    mu: float = 0.0
    """Weight of the identity in the metric, in the units of a key's square: each past or present key is worth 1."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0 + mu I``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device, self.mu)

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
    """Least-squares batch editing (Meng et al. 2023, arXiv:2210.07229, eq. 14): metric ``lambda C0 + mu I``, slack 1.

    With ``mu`` and a consolidated memory, whose past keys are part of the metric, a sequence of batches minimizes::

        sum_i ||W k_i - v_i||^2 + lambda ||(W - W0) K0||^2 + mu ||W - W0||^2

    over all edits so far, where C0 = K0 K0^T. That is the objective of RLSEdit (Wang et al. 2026, arXiv:2601.15686) and
    of ENCORE (Gupta et al. 2025, arXiv:2502.01636), whose norm constraint is the last term. Without the memory the last
    two terms hold for each batch on its own, and the norm of all batches together may still grow.
    """

    covariance_weight: float = 15000.0
    """Lambda, ``mom2_update_weight`` of the authors' code."""
    ridge: float = 1e-6
    """Fraction of C0's mean eigenvalue that is added to its diagonal."""
    mu: float = 0.0
    """Weight of the identity in the metric, in the units of a key's square: each past or present key is worth 1."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``lambda C0 + mu I``."""
        return Preservation.from_moments(moments, self.covariance_weight, self.ridge, device, self.mu)

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
    l2: float = 10.0
    """Weight of the L2 term on the update, which is the slack in the closed form; 10 is ``L2`` of the authors' code."""

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the identity on C0's null space."""
        return Preservation.null_space(moments, self.threshold, device)

    @property
    def slack(self) -> float:
        """The weight of the L2 term."""
        return self.l2


@dataclass(frozen=True)
class BetaEdit(Method):
    """Edits inside a null space that still pay there for C0 and for past keys (Liu et al. 2026, arXiv:2605.09285).

    With P the projector on the null space, K_p the past keys and slack 1 the update is::

        delta^T = (P (K K^T + K_p K_p^T + lambda C0) + l2 I)^-1 P K R^T

    AlphaEdit's null space is one up to a threshold only, so that updates leak; ``lambda`` makes the leak cost what it
    does to C0. After every ``refresh_every`` edits P is computed again, from the eigenvectors of
    ``(K_p K_p^T / n + lambda C0) / (lambda + 1)`` with eigenvalues under the threshold, where n is the number of past
    edits. The past keys come from a consolidated memory, without which the method is refused.
    """

    covariance_weight: float = 3000.0
    """Lambda, the weight of C0 inside the null space (``lambda1`` of the authors' code)."""
    threshold: float = 2e-2
    """Eigenvectors whose eigenvalue lies below this span the null space; in C0's own units."""
    l2: float = 10.0
    """Weight of the identity inside the null space (``lambda2`` of the authors' code)."""
    refresh_every: int = 1000
    """Number of edits between two computations of the projector (``tau`` of the authors' code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("BetaEdit", l2=self.l2)
        at_least_one("BetaEdit", refresh_every=self.refresh_every)

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``l2 I + lambda C0`` on C0's null space."""
        return self._inside(moments, moments, device)

    def refreshed(self, moments: Tensor, past: Tensor, edits: int, device: torch.device | None = None) -> Preservation:
        """Return the same metric on the null space of C0 and the past keys together."""
        weight = self.covariance_weight
        return self._inside((past / edits + weight * moments) / (weight + 1), moments, device)

    def _inside(self, spanning: Tensor, moments: Tensor, device: torch.device | None) -> Preservation:
        subspace = Preservation.null_space(spanning, self.threshold, device, self.l2)
        return subspace.plus_moments(self.covariance_weight * moments.to(subspace.factor))

    @property
    def slack(self) -> float:
        """Slack 1: an edit weighs as much as a past key."""
        return 1.0

    @property
    def edits_between_refreshes(self) -> int:
        """The setting ``refresh_every``."""
        return self.refresh_every


@dataclass(frozen=True)
class UltraEdit(Method):
    """Ridge regression on the keys of the batch alone (UltraEdit, arXiv:2505.14679): metric ``mu I``, slack 1.

    The update is ``R K^T (K K^T + mu I)^-1``. With ``values.source: gradient`` the residuals R are UltraEdit's steps
    (:mod:`editlab.values.gradient`). No text is read for C0, so ordinary keys are not preserved.
    """

    mu: float = 1.0
    """Weight of the identity; 1 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("UltraEdit", mu=self.mu)

    def preservation(self, moments: Tensor, device: torch.device | None = None) -> Preservation:
        """Return the metric ``mu I``; only the shape of ``moments`` matters."""
        device = device or (torch.device("cpu") if moments.is_meta else moments.device)
        identity = torch.eye(moments.shape[-1], dtype=torch.float64, device=device)
        return Preservation(self.mu**0.5 * identity.expand(moments.shape))

    @property
    def slack(self) -> float:
        """Slack 1: a residual weighs as much as the update itself."""
        return 1.0

    @property
    def needs_moments(self) -> bool:
        """False: the identity needs no text."""
        return False
