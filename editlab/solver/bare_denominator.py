"""The scale of ROME's published code: the update of one fact is exact at another key than the one it is solved for.

ROME's code divides by a product of two different keys, the mean key k over contexts and the bare prompt's key b::

    delta = r (C^-1 k)^T / ((C^-1 k)^T b)

while equation 2 of the paper (Meng et al. 2022, arXiv:2202.05262) has k in both places. The direction ``C^-1 k`` is the
same, so delta is the closed form's update, scaled until ``delta b = r``. If k and b are almost orthogonal in the
metric, the scale is very large: the cause of the sudden collapse that Gupta et al. 2024 describe (arXiv:2403.07175).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from editlab.errors import EditLabError
from editlab.solver.closed_form import Solution


def exact_at(solution: Solution, key: Tensor, residual: Tensor) -> Solution:
    """The solution for one fact, scaled so that its update maps ``key`` to the residual.

    Args:
        solution: the update of one fact, a multiple of the residual in each column.
        key: float64 [d_k].
        residual: the residual that the solution was computed for, float64 [d_v].

    Raises:
        EditLabError: The update does not depend on the key, so no scale makes it exact.
    """
    key, residual = key.to(solution.delta.device), residual.to(solution.delta.device)
    size = float(residual @ residual)
    if size == 0:
        return solution  # nothing to solve for, and the update is 0
    reached = float(residual @ (solution.delta @ key)) / size
    if reached == 0:
        raise EditLabError(
            "The key of the bare prompt is orthogonal to the mean key, so ROME's published form has no solution: set "
            "model.conventions to own."
        )
    delta = solution.delta / reached
    left = float((delta @ key - residual).norm() / residual.norm())
    note = f"scaled by {1 / reached:.3g} to hold at the key of the bare prompt"
    return replace(solution, delta=delta, residual=left, notes=[*solution.notes, note])
