"""Error compensation: the part of an update that did not go into the weights takes part in the next solve.

A post-step, or a verdict that scales an update, leaves the weights at ``W + applied`` where the solve wanted
``W + solved``. The difference ``X = solved - applied`` is carried: the next solve minimizes::

    tr((delta - X) G (delta - X)^T) + sum_i ||delta k_i - r_i||^2 / s_i

in place of ``tr(delta G delta^T) + ...``, where G is the metric with all past keys in it. If no post-step followed, the
weights would then be those of one joint solve over all edits so far.

It is the error term of OTE-SE (Wang et al. 2026, arXiv:2605.26670). Its code keeps ``E = (applied - solved) G`` and
solves ``delta (G + K K^T) = R K^T - E``, which is the same: ``E = -X G``. Here X itself is kept, since it stays valid
where the metric changes between two batches.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from editlab.lm.precision import widened
from editlab.solver.closed_form import Solution, solve
from editlab.solver.constraints import DUPLICATE_TOLERANCE, Constraints
from editlab.solver.preservation import Preservation


def solve_from(
    carried: Tensor,
    constraints: Constraints,
    metric: Preservation,
    condition_limit: float = 1e10,
    same_key: float = DUPLICATE_TOLERANCE,
    firmness: float = 0.0,
    context_keys: Tensor | None = None,
    context_weight: float = 0.0,
) -> Solution:
    """Computes the update of a batch that also makes up for what was cut off from earlier updates.

    Args:
        carried: X, the part of earlier updates that is not in the weights, [d_v, d_k].
        constraints: keys, residuals and slacks; the residuals are those of the weights as they are.
        metric: the metric G.
        condition_limit: as for :func:`~editlab.solver.closed_form.solve`.
        same_key: as for :func:`~editlab.solver.closed_form.solve`.
        firmness: as for :func:`~editlab.solver.closed_form.solve`; it holds back what is added to X, and not X.
        context_keys: keys at which the present outputs are to be preserved in this solve alone, [d_k, m].
        context_weight: their weight in the metric.

    Returns:
        The solution, whose update contains X as far as the constraints and the context keys allow.
    """
    start = widened(carried, metric.device)
    if context_keys is not None and context_weight:
        # They ask for delta c = 0 and not for delta c = X c: with C = G + w c c^T the minimum without constraints is
        # X G C^-1 = X - w X c c^T C^-1.
        context_keys = widened(context_keys, metric.device)
        metric = metric.plus(context_keys, context_weight)
        start = start - context_weight * (start @ context_keys) @ metric.inverse_times(context_keys).T
    constraints = constraints.to(metric.device)
    remaining = replace(constraints, residuals=constraints.residuals.double() - start @ constraints.keys.double())
    solution = solve(remaining, metric, condition_limit, same_key, firmness)
    solution.delta = solution.delta + start
    return solution
