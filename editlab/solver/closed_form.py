"""The one closed form: ROME, MEMIT, EMMET, AlphaEdit and replay are each a metric and a slack.

Given keys ``K`` (d_k x n), residuals ``R = V - W K`` (d_v x n), a positive definite preservation metric ``C``
(d_k x d_k) and slacks ``s_i >= 0``, the update that moves the weight least, measured by ``C``, is::

    minimize  tr(delta C delta^T) + sum_i ||delta k_i - r_i||^2 / s_i        (s_i = 0: an equality)
    delta = R (K^T C^-1 K + diag(s))^-1 K^T C^-1

With every slack 0 it is EMMET (Gupta et al. 2024, arXiv:2403.14236) and, for one fact, ROME (Meng et al. 2022a,
arXiv:2202.05262); with every slack 1 it is MEMIT (Meng et al. 2022b, arXiv:2210.07229). ``C^-1`` is never formed:
the metric whitens keys by its Cholesky factor. Everything here is pure tensors in float64; no model in sight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlab.errors import EditLabError, UserError
from editlab.lm.memory import lacks_memory, release
from editlab.lm.precision import widened

log = logging.getLogger(__name__)

DUPLICATE_TOLERANCE = 1e-5
"""Two keys are the same when they differ by less than this fraction of their norm. It is meant for float32, whose
forward passes differ more between batches than float64's do; keys of different facts differ by far more."""


def duplicate_tolerance(rounding: float) -> float:
    """The fraction of its norm by which one key may differ between two forward passes.

    Args:
        rounding: relative error of the model's matrix products (:func:`editlab.lm.precision.rounding`). One key read in
            two bfloat16 passes differs by up to twice that.
    """
    return max(DUPLICATE_TOLERANCE, 2 * rounding)


@dataclass(frozen=True)
class Preservation:
    """A preservation metric ``C``, kept as what whitens keys: ``C^-1 = T^T T`` with ``A = T K``.

    ``columns`` are whitened extra keys ``B`` that were added since the factor was made, so that the metric is
    ``C + (weighted) sum k k^T``. By Woodbury's identity they cost an m x m solve instead of a new factorization.
    """

    factor: Tensor
    """Lower Cholesky factor L of C, or an orthonormal basis U of a subspace (then T = U^T), float64 [d_k, r]."""
    is_basis: bool = False
    """Whether ``factor`` is a basis (AlphaEdit's null space) rather than a Cholesky factor."""
    columns: Tensor | None = None
    """Whitened extra keys, float64 [r, m], already scaled by the square root of their weight."""

    @property
    def device(self) -> torch.device:
        """Where the metric lies, and where :func:`solve` works."""
        return self.factor.device

    @property
    def bytes(self) -> int:
        """Memory of the factor, which does not change while columns are added."""
        return self.factor.numel() * self.factor.element_size()

    def to(self, device: torch.device) -> Preservation:
        """The same metric on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        return Preservation(self.factor.to(device), self.is_basis, columns)

    @classmethod
    def from_moments(
        cls, moments: Tensor, weight: float = 1.0, ridge: float = 1e-6, device: torch.device | None = None
    ) -> Preservation:
        """``weight * C0`` with a ridge of ``ridge`` times its mean eigenvalue, factored once.

        One matrix [d_k, d_k] is made on the device and becomes the factor. Where the device lacks memory for it, the
        metric is made on the CPU, and stays there.

        Args:
            moments: second moments of keys C0 = E[k k^T], [d_k, d_k], symmetric.
            weight: lambda, how many ordinary tokens' worth of preservation C0 stands for.
            ridge: share of the mean eigenvalue that is added to the diagonal, so that directions which the text
                never used keep a finite cost.
            device: where the metric shall lie; default: where the moments do.

        Raises:
            EditLabError: where the matrix is not finite or not positive definite even with the ridge.
        """
        return _where_it_fits(device or moments.device, lambda there: cls._factored(moments, weight, ridge, there))

    @classmethod
    def _factored(cls, moments: Tensor, weight: float, ridge: float, device: torch.device) -> Preservation:
        c = _copied(moments, device).mul_(weight)
        if not torch.isfinite(c.sum()):  # looking at each would take memory for a third such matrix
            raise EditLabError(
                "The second moments hold values that are not finite; delete the cached file and compute them anew."
            )
        c.diagonal().add_(ridge * c.diagonal().mean())
        factor, fault = _cholesky_in_place(c)
        if fault:
            raise EditLabError(
                f"The second moments are not positive definite with a ridge of {ridge:g}: raise moments.tokens, "
                "or the ridge."
            )
        return cls(factor)

    @classmethod
    def null_space(cls, moments: Tensor, threshold: float, device: torch.device | None = None) -> Preservation:
        """The identity on the span of C0's eigenvectors with eigenvalues under ``threshold``; AlphaEdit's metric.

        Outside that span nothing may move at all (Fang et al. 2024, arXiv:2410.02355). ``threshold`` is absolute,
        as in the paper, in the units of C0. ``device`` is as in :meth:`from_moments`.

        Raises:
            UserError: where no eigenvalue lies under the threshold.
        """
        return _where_it_fits(device or moments.device, lambda there: cls._null_space(moments, threshold, there))

    @classmethod
    def _null_space(cls, moments: Tensor, threshold: float, device: torch.device) -> Preservation:
        values, vectors = torch.linalg.eigh(widened(moments, device))
        basis = vectors[:, values < threshold]
        if basis.shape[1] == 0:
            raise UserError(
                f"No eigenvalue of the second moments is under {threshold:g}, so the null space is empty: raise the "
                f"threshold (they run from {values[0]:.3g} to {values[-1]:.3g})."
            )
        return cls(basis.contiguous(), is_basis=True)

    def whiten(self, keys: Tensor) -> Tensor:
        """``T K``: [d_k, n] -> [r, n], float64, on the metric's device."""
        keys = widened(keys, self.device)
        if self.is_basis:
            return self.factor.T @ keys
        return torch.linalg.solve_triangular(self.factor, keys, upper=False)

    def unwhiten(self, whitened: Tensor) -> Tensor:
        """``T^T A``: [r, n] -> [d_k, n], so that ``unwhiten(whiten(K)) = C^-1 K`` where no columns were added."""
        if self.is_basis:
            return self.factor @ whitened
        return torch.linalg.solve_triangular(self.factor.T, whitened, upper=True)

    def plus(self, keys: Tensor, weight: float | Tensor = 1.0) -> Preservation:
        """The metric ``C + sum_i weight_i k_i k_i^T`` for keys [d_k, m]; this one is left as it is.

        Once more columns have gathered than half the dimension they are folded into a new factor, so memory and
        time stay bounded however long the sequence is.
        """
        if keys.shape[1] == 0:
            return self
        scale = torch.as_tensor(weight, dtype=torch.float64, device=self.device).sqrt()
        columns = self.whiten(keys) * scale
        if self.columns is not None:
            columns = torch.cat([self.columns, columns], dim=1)
        if columns.shape[1] <= self.factor.shape[1] // 2:
            return Preservation(self.factor, self.is_basis, columns)
        return self._folded(columns @ columns.T)

    def plus_moments(self, moments: Tensor) -> Preservation:
        """The metric ``C + P`` for a symmetric positive semidefinite ``P`` [d_k, d_k]; this one is left as it is.

        Where this one's device lacks memory for it, the new metric lies on the CPU.

        Raises:
            EditLabError: where the sum is not positive definite.
        """
        return _where_it_fits(self.device, lambda there: self.to(there)._plus_moments(moments))

    def _plus_moments(self, moments: Tensor) -> Preservation:
        extra = self.whiten(moments)
        extra = self.whiten(extra.T)  # the first one is freed by now
        if self.columns is not None:
            extra = extra + self.columns @ self.columns.T
        extra = extra + extra.T
        return self._folded(extra.div_(2))

    def _folded(self, extra: Tensor) -> Preservation:
        """The metric whose whitened form is ``I + extra``, with a factor of its own; ``extra`` is overwritten."""
        # C + P = L (I + X) L^T = (L F)(L F)^T with F the factor of the bracket; a basis turns the same way.
        extra.diagonal().add_(1)
        inner, fault = _cholesky_in_place(extra)
        if fault:
            raise EditLabError(
                "The metric with the added keys is not positive definite: lower the weight that they have."
            )
        if self.is_basis:
            # T = F^-1 U^T, hence T^T = U F^-T, which is no longer orthonormal but whitens all the same.
            turned = torch.linalg.solve_triangular(inner, self.factor.T, upper=False).T
            return Preservation(turned.contiguous(), True)
        return Preservation(self.factor @ inner, False)

    def correct(self, whitened: Tensor) -> Tensor:
        """``(I + B B^T)^-1 A``: accounts for the added columns in whitened space (Woodbury)."""
        if self.columns is None:
            return whitened
        b = self.columns
        small = torch.eye(b.shape[1], dtype=b.dtype, device=b.device) + b.T @ b
        return whitened - b @ torch.linalg.solve(small, b.T @ whitened)


@dataclass
class Constraints:
    """What an update shall achieve: ``(W + delta) k_i = v_i``, each with its slack."""

    keys: Tensor
    """[d_k, n]"""
    residuals: Tensor
    """``V - W K`` against the current weights, [d_v, n]"""
    slack: Tensor
    """[n], >= 0; 0 is an equality"""
    optional: Tensor | None = None
    """bool [n]: constraints (replayed ones) that are dropped first where the system is ill-conditioned"""

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

        Keys are the same that differ by less than the fraction ``tolerance`` of their norm.

        Two edits of one subject share their key (a causal model can not tell them apart there). Soft constraints on
        the same key are equal to one with the precision-weighted mean of the residuals and the summed precision
        1/s; hard ones can not all hold, so their plain mean is asked for, and soft ones beside a hard one are void.
        An optional hard one, which would void the edits beside it, is left out where there are some that are not.
        """
        group = _groups(self.keys, tolerance)
        count = int(group.max()) + 1
        if count == len(self):
            return self
        assert self.optional is not None
        needed = torch.zeros(count, dtype=torch.bool, device=group.device)
        needed[group[~self.optional]] = True
        left_out = self.optional & (self.slack == 0) & needed[group]
        hard = (self.slack == 0) & ~left_out
        any_hard = torch.zeros(count, dtype=torch.bool, device=hard.device)
        any_hard[group[hard]] = True
        precision = torch.where(hard, 1.0, 1.0 / self.slack.double().clamp_min(1e-300))
        precision = torch.where((any_hard[group] & ~hard) | left_out, 0.0, precision)
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


@dataclass
class Solution:
    """An update and what was observed on the way to it."""

    delta: Tensor
    """[d_v, d_k], float64"""
    condition: float
    """Condition number of the system that was solved"""
    raised_slack: float = 0.0
    """What was added to every slack so that the system could be solved"""
    dropped: int = 0
    """Optional (replayed) constraints that were left out for the same reason"""
    merged: int = 0
    """Constraints that shared their key with another"""
    least_squares: bool = False
    """Whether the last resort, a pseudo-inverse, was needed"""
    residual: float = 0.0
    """||delta K - R|| / ||R|| over the constraints as given: what the slack left undone"""
    notes: list[str] = field(default_factory=list)
    """What happened beyond the plain solve, in words"""


def solve(
    constraints: Constraints,
    metric: Preservation,
    condition_limit: float = 1e10,
    same_key: float = DUPLICATE_TOLERANCE,
) -> Solution:
    """The update ``R (K^T C^-1 K + diag(s))^-1 K^T C^-1``, on the metric's device.

    Keys that differ by less than the fraction ``same_key`` of their norm are the same, and constraints on one key are
    merged first. Where the system's condition number is above ``condition_limit`` the slack is raised tenfold from
    1e-10 of the mean diagonal until it is under it, up to 1e-4 of it; then the optional constraints are dropped; the
    last resort is the minimum-norm least-squares solution. Each such step is reported in the solution.

    Raises:
        EditLabError: where keys or residuals are not finite.
    """
    constraints = constraints.to(metric.device)
    if not (torch.isfinite(constraints.keys).all() and torch.isfinite(constraints.residuals).all()):
        raise EditLabError(
            "Keys or residuals of this batch are not finite: lower values.lr, or take a wider dtype "
            "(trainer.precision)."
        )
    if len(constraints) == 0:
        zero = constraints.residuals.new_zeros(constraints.residuals.shape[0], constraints.keys.shape[0])
        return Solution(zero.double(), condition=1.0)
    system = constraints.merged(same_key)
    solution = _solve_merged(system, metric, condition_limit)
    solution.merged = len(constraints) - len(system)
    if solution.merged:
        solution.notes.append(
            f"{solution.merged} constraints shared their key with another and were averaged, hard replayed ones not"
        )
    wanted = constraints.residuals.double()
    left = solution.delta @ constraints.keys.double() - wanted
    solution.residual = float(left.norm() / wanted.norm().clamp_min(1e-300))
    return solution


def _solve_merged(system: Constraints, metric: Preservation, limit: float) -> Solution:
    assert system.optional is not None
    whitened = metric.whiten(system.keys)
    corrected = metric.correct(whitened)
    gram = whitened.T @ corrected
    matrix = (gram + gram.T) / 2 + torch.diag(system.slack.double())
    residuals = system.residuals.double()
    direction = metric.unwhiten(corrected.contiguous()).T  # (C^-1 K)^T
    eigenvalues = torch.linalg.eigvalsh(matrix)
    scale = float(gram.diagonal().mean())
    for raised in (0.0, *(scale * 10.0**power for power in range(-10, -3))):
        condition = _condition(eigenvalues + raised)
        if condition <= limit:
            inner = torch.linalg.solve(_with_diagonal(matrix, raised), residuals.T).T
            notes = [f"slack raised by {raised:.2e} for the condition number"] if raised else []
            return Solution(inner @ direction, condition, raised_slack=raised, notes=notes)
    if bool(system.optional.any()) and not bool(system.optional.all()):
        solution = _solve_merged(system.subset(~system.optional), metric, limit)
        solution.dropped = int(system.optional.sum())
        solution.notes.append(f"{solution.dropped} replayed constraints dropped: the system was ill-conditioned")
        return solution
    inner = torch.linalg.lstsq(matrix.cpu(), residuals.T.cpu(), driver="gelsd").solution.T.to(residuals)
    return Solution(
        inner @ direction,
        _condition(eigenvalues),
        least_squares=True,
        notes=["the system stayed ill-conditioned: minimum-norm least squares used"],
    )


def effective_weight(slack: Tensor, covariance_weight: float) -> float:
    """``mean(slack) * lambda``: the weight of C0 that MEMIT would need for the same update; of the edits' own slack.

    ``(lambda C0, slack s)`` and ``(s lambda C0, slack 1)`` give the same delta, so two runs are comparable only at
    equal effective weight. It is 0 for hard constraints: there lambda cancels.
    """
    return float(slack.double().mean()) * covariance_weight if slack.numel() else 0.0


def diagnostics(solution: Solution) -> dict[str, float]:
    """What a step logs of its solution, by name."""
    return {
        "gram_condition": solution.condition,
        "raised_slack": solution.raised_slack,
        "merged": float(solution.merged),
        "dropped": float(solution.dropped),
        "least_squares": float(solution.least_squares),
        "residual_left": solution.residual,
    }


def _condition(eigenvalues: Tensor) -> float:
    """Condition number from a symmetric matrix's ascending eigenvalues; inf where it is not positive definite."""
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    return high / low if low > 0 else float("inf")


def _with_diagonal(matrix: Tensor, number: float) -> Tensor:
    """``matrix + number * I``."""
    shifted = matrix.clone()
    shifted.diagonal().add_(number)
    return shifted


def _where_it_fits(device: torch.device, make: Callable[[torch.device], Preservation]) -> Preservation:
    """What ``make`` gives for the device, or for the CPU where the device lacks memory."""
    try:
        return make(device)
    except Exception as error:
        if device.type == "cpu" or not lacks_memory(error):
            raise
    release()
    log.warning("The memory of %s does not hold a metric: this layer is solved on the CPU, which takes longer", device)
    return make(torch.device("cpu"))


def _copied(matrix: Tensor, device: torch.device) -> Tensor:
    """A float64 copy of a matrix on a device, always in memory of its own."""
    moved = widened(matrix, device)
    return moved.clone() if moved is matrix else moved


def _cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower Cholesky factor in the matrix's own memory, and whether it is no factor: not positive definite."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return factor, info.item() != 0


def _groups(keys: Tensor, tolerance: float) -> Tensor:
    """A group number for each key [d_k, n]: keys that are the same (up to the tolerance) share it."""
    k = keys.double()
    squares = (k * k).sum(0)
    distance = (squares[:, None] + squares[None, :] - 2 * k.T @ k).clamp_min(0)
    same = distance <= tolerance**2 * torch.maximum(squares[:, None], squares[None, :])
    # Rounding in the expansion above is about 1e-16 of the squares, far under the tolerance squared (1e-10 or more).
    first = same.to(torch.uint8).argmax(dim=1)
    return torch.unique(first, return_inverse=True)[1]
