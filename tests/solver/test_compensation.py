"""Error compensation against OTE-SE's recursion and against problems solved densely, in float64."""

import pytest
import torch

from editlab.solver.closed_form import solve
from editlab.solver.compensation import solve_from
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT
from editlab.solver.post_steps import RECT, REVIVE, SPHERE, EditedWeight
from tests.solver.test_closed_form import D_K, D_V, close, problem

EYE = torch.eye(D_K, dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("step", [RECT(0.3), SPHERE()])
def test_it_is_otes_recursion_and_ends_at_the_joint_solve(step):
    # OTE-SE (arXiv:2605.26670): delta (G + K K^T) = R K^T - E with G = lambda C0 + past keys + I, then
    # E = (applied - delta) (G + K K^T). Without a post-step after the last batch the weights are those of one joint
    # solve over all facts; with post-steps and no compensation they are not.
    c0, batch = problem(12, slack=1)
    original, values = normal(7, D_V, D_K), batch.residuals
    g, error, theirs = 20 * c0 + EYE, torch.zeros(D_V, D_K, dtype=torch.float64), original.clone()
    metric, carried, ours = MEMIT(20.0, ridge=1e-15, mu=1.0).preservation(c0), None, original.clone()
    alone = original.clone()
    for start in (0, 4, 8):
        keys, wanted = batch.keys[:, start : start + 4], values[:, start : start + 4]
        g = g + keys @ keys.T
        delta = ((wanted - theirs @ keys) @ keys.T - error) @ torch.linalg.inv(g)
        applied = step.apply(delta, EditedWeight(original, theirs - original)) if start < 8 else delta
        error, theirs = (applied - delta) @ g, theirs + applied

        ones = torch.ones(4, dtype=torch.float64)
        constraints = Constraints(keys, wanted - ours @ keys, ones)
        solution = solve(constraints, metric) if carried is None else solve_from(carried, constraints, metric)
        applied = step.apply(solution.delta, EditedWeight(original, ours - original)) if start < 8 else solution.delta
        carried, ours = solution.delta - applied, ours + applied
        close(ours, theirs, 1e-10)

        delta = solve(Constraints(keys, wanted - alone @ keys, ones), metric).delta
        alone += step.apply(delta, EditedWeight(original, alone - original)) if start < 8 else delta
        metric = metric.plus(keys)
    k = batch.keys
    joint = (values - original @ k) @ k.T @ torch.linalg.inv(20 * c0 + EYE + k @ k.T)
    close(ours - original, joint, 1e-10)
    assert (alone - original - joint).norm() > 0.05 * joint.norm()


def test_revive_ends_at_the_filtered_joint_solve():
    # Q is a projection, so D + Q(D* - D) = Q(D*) for a sum D of earlier filtered updates and the joint solve D*.
    c0, batch = problem(8, slack=1)
    step, original, total = REVIVE(0.3), normal(7, D_V, D_K), torch.zeros(D_V, D_K, dtype=torch.float64)
    metric, carried = MEMIT(20.0, ridge=1e-15).preservation(c0), torch.zeros(D_V, D_K)
    for start in (0, 4):
        part = batch.subset(torch.arange(start, start + 4))
        part.residuals = part.residuals - total @ part.keys
        delta = solve_from(carried, part, metric).delta
        applied = step.apply(delta, EditedWeight(original, total))
        carried, total, metric = delta - applied, total + applied, metric.plus(part.keys)
    k = batch.keys
    joint = batch.residuals @ k.T @ torch.linalg.inv(20 * c0 + k @ k.T)
    close(total, step.apply(joint, EditedWeight(original, total)), 1e-10)
    close(total + carried, joint, 1e-10)


def test_of_nothing_carried_it_is_the_plain_solve():
    c0, batch = problem(4, slack=0.5)
    metric, zero = MEMIT().preservation(c0), torch.zeros(D_V, D_K)
    close(solve_from(zero, batch, metric).delta, solve(batch, metric).delta)


@pytest.mark.parametrize("past", [0, 3, 9])  # as columns, or folded into the factor
def test_context_keys_ask_for_no_change_of_their_outputs(past):
    # The minimum of tr((d - X) G (d - X)^T) + b sum ||d c||^2 + sum ||d k - r||^2 / s, from its normal equations.
    c0, batch = problem(4, slack=0.5)
    x, context, old = normal(3, D_V, D_K), normal(4, D_K, 5), normal(5, D_K, past)
    g = 20 * c0 + EYE + old @ old.T
    left = g + 0.3 * context @ context.T + 2 * batch.keys @ batch.keys.T
    expected = (x @ g + 2 * batch.residuals @ batch.keys.T) @ torch.linalg.inv(left)
    metric = MEMIT(20.0, ridge=1e-15, mu=1.0).preservation(c0).plus(old)
    close(solve_from(x, batch, metric, context_keys=context, context_weight=0.3).delta, expected, 1e-10)


def test_equalities_hold_exactly_whatever_is_carried():
    # By the dense KKT system of: minimize tr((d - X) C (d - X)^T) subject to d K = R.
    c0, batch = problem(4)
    x = normal(3, D_V, D_K)
    kkt = torch.zeros(D_K + 4, D_K + 4, dtype=torch.float64)
    kkt[:D_K, :D_K], kkt[:D_K, D_K:], kkt[D_K:, :D_K] = c0, batch.keys, batch.keys.T
    right = torch.cat([c0 @ x.T, batch.residuals.T])
    expected = torch.linalg.solve(kkt, right)[:D_K].T
    got = solve_from(x, batch, MEMIT(1.0, ridge=1e-15).preservation(c0)).delta
    close(got, expected, 1e-10)
    close(got @ batch.keys, batch.residuals, 1e-10)
