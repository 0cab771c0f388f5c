"""The closed form of an edit: ROME, MEMIT, EMMET, AlphaEdit and replay are each a metric and a slack.

Given keys ``K`` (d_k x n), residuals ``R = V - W K`` (d_v x n), a positive definite preservation metric ``C``
(d_k x d_k) and slacks ``s_i >= 0``, the update that moves the weight least, measured by ``C``, is::

    minimize  tr(delta C delta^T) + sum_i ||delta k_i - r_i||^2 / s_i        (s_i = 0: an equality)
    delta = R (K^T C^-1 K + diag(s))^-1 K^T C^-1

With every slack 0 it is EMMET (Gupta et al. 2024, arXiv:2403.14236) and, for one fact, ROME (Meng et al. 2022a,
arXiv:2202.05262); with every slack 1 it is MEMIT (Meng et al. 2022b, arXiv:2210.07229). ``C^-1`` is never formed:
the metric whitens keys by its Cholesky factor. The solver works on float64 tensors and knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlab.errors import EditLabError
from editlab.solver.constraints import DUPLICATE_TOLERANCE, Constraints
from editlab.solver.preservation import Preservation


@dataclass
class Solution:
    """An update, with how well the system was conditioned and what had to be done to solve it."""

    delta: Tensor
    """[d_v, d_k], float64"""
    condition: float
    """Condition number of the system that was solved"""
    raised_slack: float = 0.0
    """Number added to every slack so that the system could be solved"""
    firm_slack: float = 0.0
    """Number added to every slack to hold the update back (``firmness``)"""
    dropped: int = 0
    """Number of optional (replayed) constraints that were dropped for the same reason"""
    merged: int = 0
    """Number of constraints that were merged into another on the same key"""
    least_squares: bool = False
    """Whether the system stayed ill-conditioned and was solved by minimum-norm least squares"""
    residual: float = 0.0
    """||delta K - R|| / ||R|| over the constraints as given: the fraction of the residual that the slack leaves"""
    notes: list[str] = field(default_factory=list)
    """A phrase for each departure from the plain solve, for the log"""


def solve(
    constraints: Constraints,
    metric: Preservation,
    condition_limit: float = 1e10,
    same_key: float = DUPLICATE_TOLERANCE,
    firmness: float = 0.0,
) -> Solution:
    """Computes the update ``R (K^T C^-1 K + diag(s))^-1 K^T C^-1``, on the metric's device.

    A firm solve holds the update back as Levenberg and Marquardt's damping does (Marquardt 1963): it adds ``firmness``
    times the mean diagonal of ``K^T C^-1 K`` to every slack. As the firmness grows, the update's norm in the metric C
    falls from that of the plain solve towards 0, and if all slacks are equal, no other update of the same norm leaves a
    smaller residual ``sum_i ||delta k_i - r_i||^2``: it is a trust region. For one fact without slack the update is
    divided by ``1 + firmness``.

    Constraints on the same key are merged first. If the condition number of ``K^T C^-1 K + diag(s)`` is then above the
    limit, all slacks are raised: first by 1e-10 of the mean diagonal of ``K^T C^-1 K``, then tenfold each time, up to
    1e-4 of it. If that does not suffice, the optional constraints are dropped; the last resort is the minimum-norm
    least-squares solution. The solution reports each of these steps.

    Args:
        constraints: keys, residuals and slacks.
        metric: the preservation metric C.
        condition_limit: largest acceptable condition number.
        same_key: fraction of its norm by which a key may differ from another and still count as the same.
        firmness: how much the update is held back, at least 0; 0 is the plain solve.

    Raises:
        EditLabError: Keys or residuals are not finite.
    """
    constraints = constraints.to(metric.device)
    if not (torch.isfinite(constraints.keys).all() and torch.isfinite(constraints.residuals).all()):
        raise EditLabError(
            "Keys or residuals of this batch are not finite: lower values.lr, or set a wider dtype (trainer.precision)."
        )
    if len(constraints) == 0:
        zero = constraints.residuals.new_zeros(constraints.residuals.shape[0], constraints.keys.shape[0])
        return Solution(zero.double(), condition=1.0)
    system = constraints.merged(same_key)
    solution = _solve_merged(system, metric, condition_limit, firmness)
    solution.merged = len(constraints) - len(system)
    if solution.merged:
        solution.notes.append(
            f"{solution.merged} constraints shared their key with another and were averaged, except hard replayed ones"
        )
    wanted = constraints.residuals.double()
    left = solution.delta @ constraints.keys.double() - wanted
    solution.residual = float(left.norm() / wanted.norm().clamp_min(1e-300))
    return solution


def _solve_merged(system: Constraints, metric: Preservation, limit: float, firmness: float) -> Solution:
    assert system.optional is not None
    whitened = metric.whiten(system.keys)
    corrected = metric.correct(whitened)
    gram = whitened.T @ corrected
    scale = float(gram.diagonal().mean())
    firm = firmness * scale
    matrix = (gram + gram.T) / 2 + torch.diag(system.slack.double() + firm)
    residuals = system.residuals.double()
    direction = metric.unwhiten(corrected.contiguous()).T  # (C^-1 K)^T
    eigenvalues = torch.linalg.eigvalsh(matrix)
    for raised in (0.0, *(scale * 10.0**power for power in range(-10, -3))):
        condition = _condition(eigenvalues + raised)
        if condition <= limit:
            inner = torch.linalg.solve(_with_diagonal(matrix, raised), residuals.T).T
            notes = [f"slack raised by {raised:.2e} for the condition number"] if raised else []
            return Solution(inner @ direction, condition, raised_slack=raised, firm_slack=firm, notes=notes)
    if bool(system.optional.any()) and not bool(system.optional.all()):
        solution = _solve_merged(system.subset(~system.optional), metric, limit, firmness)
        solution.dropped = int(system.optional.sum())
        solution.notes.append(f"{solution.dropped} replayed constraints dropped: the system was ill-conditioned")
        return solution
    inner = torch.linalg.lstsq(matrix.cpu(), residuals.T.cpu(), driver="gelsd").solution.T.to(residuals)
    return Solution(
        inner @ direction,
        _condition(eigenvalues),
        firm_slack=firm,
        least_squares=True,
        notes=["the system stayed ill-conditioned: minimum-norm least squares used"],
    )


def effective_weight(slack: Tensor, covariance_weight: float) -> float:
    """The effective weight ``mean(slack) * lambda``: the weight of C0 at which MEMIT would compute the same update.

    ``(lambda C0, slack s)`` and ``(s lambda C0, slack 1)`` give the same delta, so two runs are comparable only at
    equal effective weight. It is 0 for hard constraints, for which lambda cancels.

    Args:
        slack: slack of the batch's own edits, without replayed ones, [n].
        covariance_weight: lambda.
    """
    return float(slack.double().mean()) * covariance_weight if slack.numel() else 0.0


def diagnostics(solution: Solution) -> dict[str, float]:
    """The numbers of a solution that a step logs, by name."""
    return {
        "gram_condition": solution.condition,
        "raised_slack": solution.raised_slack,
        "merged": float(solution.merged),
        "dropped": float(solution.dropped),
        "least_squares": float(solution.least_squares),
        "residual_left": solution.residual,
    }


def _condition(eigenvalues: Tensor) -> float:
    """Condition number from a symmetric matrix's ascending eigenvalues; inf if it is not positive definite."""
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    return high / low if low > 0 else float("inf")


def _with_diagonal(matrix: Tensor, number: float) -> Tensor:
    """``matrix + number * I``."""
    shifted = matrix.clone()
    shifted.diagonal().add_(number)
    return shifted
