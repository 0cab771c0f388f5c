"""Methods are a metric and a slack; their parameters are checked when an object is made."""

import math
from dataclasses import replace

import pytest
import torch

from editlab.errors import UserError
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit, BetaEdit
from tests.solver.test_closed_form import D_K, D_V, close, problem


def test_slack_of_each_method():
    # ROME is exact; EMMET has the ridge of its authors' code on the Gram matrix (emmet_lambda 0.1); MEMIT is least
    # squares with unit weight; AlphaEdit's slack is its L2 term, 10 in its authors' code.
    assert [method.slack for method in (ROME(), EMMET(), EMMET(gram_ridge=0.0), MEMIT(), AlphaEdit())] == [
        0,
        0.1,
        0,
        1,
        10,
    ]
    assert ROME().largest_batch == 1
    assert EMMET().largest_batch is None


@pytest.mark.parametrize("slack", [1.0, 3.0])
def test_emmet_with_slack_1_is_refused_and_names_the_equivalent_memit(slack):
    # slack s at lambda 20 is MEMIT at weight 20 s: the identity that test_closed_form.py proves.
    with pytest.raises(UserError, match=f"use MEMIT with covariance_weight {20 * slack:g}"):
        EMMET(covariance_weight=20.0, gram_ridge=slack)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (EMMET, {"covariance_weight": 0.0}, "covariance_weight is 0"),
        (MEMIT, {"ridge": -1.0}, "ridge is -1"),
        (EMMET, {"gram_ridge": -0.5}, "slack is -0.5"),
        (AlphaEdit, {"threshold": 0.0}, "threshold is 0"),
        (AlphaEdit, {"threshold": math.inf}, "threshold is inf: it must be finite"),
        (MEMIT, {"covariance_weight": math.inf}, "covariance_weight is inf: it must be finite"),
        (ROME, {"ridge": math.nan}, "ridge is nan"),
        (EMMET, {"gram_ridge": math.nan}, "slack is nan; it must be 0 or above, and finite"),
        (EMMET, {"gram_ridge": math.inf}, "slack is inf"),
        (AlphaEdit, {"l2": math.nan}, "slack is nan"),
        (MEMIT, {"mu": -1.0}, "MEMIT.mu is -1.0: it must not be negative"),
        (ROME, {"mu": math.inf}, "ROME.mu is inf: it must be finite"),
        (BetaEdit, {"l2": 0.0}, "BetaEdit.l2 is 0"),
        (BetaEdit, {"refresh_every": 0}, "BetaEdit.refresh_every is 0: it must be at least 1"),
        (EMMET, {"gram_ridge": 2.0, "mu": 3.0}, "use MEMIT with covariance_weight 2 and mu 6"),
    ],
)
def test_values_out_of_range_are_named(method, arguments, message):
    with pytest.raises(UserError, match=message):
        method(**arguments)


EYE = torch.eye(D_K, dtype=torch.float64)


def test_mu_is_an_identity_of_its_own_in_each_metric():
    # MEMIT and ENCORE (arXiv:2502.01636): R K^T (lambda C0 + mu I + K K^T)^-1, written out. EMMET with slack s at
    # (lambda, mu) is MEMIT at (s lambda, s mu).
    c0, batch = problem(4, slack=1)
    expected = batch.residuals @ batch.keys.T @ torch.linalg.inv(30 * c0 + 7 * EYE + batch.keys @ batch.keys.T)
    close(solve(batch, MEMIT(30.0, ridge=1e-15, mu=7.0).preservation(c0)).delta, expected)
    emmet = EMMET(60.0, gram_ridge=0.5, ridge=1e-15, mu=14.0)
    halves = replace(batch, slack=torch.full((4,), emmet.slack, dtype=torch.float64))
    close(solve(halves, emmet.preservation(c0)).delta, expected)
    # ROME (arXiv:2202.05262, eq. 2) with C = C0 + mu I.
    one = batch.subset(torch.tensor([0]))
    direction = torch.linalg.inv(c0 + 7 * EYE) @ one.keys
    hard = replace(one, slack=torch.zeros(1, dtype=torch.float64))
    expected = one.residuals @ direction.T / (direction.T @ one.keys)
    close(solve(hard, ROME(ridge=1e-15, mu=7.0).preservation(c0)).delta, expected)


@pytest.mark.parametrize("method", [ROME, EMMET, MEMIT])
def test_without_mu_the_metric_has_the_same_bits(method):
    c0, _ = problem(1)
    bare = 3.0 * c0
    bare.diagonal().add_(1e-6 * bare.diagonal().mean())
    assert torch.equal(method(covariance_weight=3.0).preservation(c0).factor, torch.linalg.cholesky(bare))


def test_memit_with_mu_and_past_keys_is_rlsedits_recursion():
    # RLSEdit (arXiv:2601.15686): C_t = C_{t-1} - F (I + K^T F)^-1 F^T with F = C_{t-1} K, from
    # C_0 = (lambda^2 I + mu^2 K0^T K0)^-1, and W_t = W_{t-1} + (V - W_{t-1} K) K^T C_t. Ours: lambda^2 is `mu`, and the
    # anchor's mu^2 K0^T K0 is `covariance_weight * C0`.
    c0, batch = problem(9, slack=1)
    weight = torch.randn(D_V, D_K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inverse, theirs = torch.linalg.inv(2.5 * EYE + 40 * c0), weight.clone()
    metric, ours = MEMIT(40.0, ridge=1e-15, mu=2.5).preservation(c0), weight.clone()
    for start in (0, 3, 6):
        keys, values = batch.keys[:, start : start + 3], batch.residuals[:, start : start + 3]
        f = inverse @ keys
        inverse = inverse - f @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) + keys.T @ f) @ f.T
        theirs = theirs + (values - theirs @ keys) @ keys.T @ inverse
        constraints = Constraints(keys, values - ours @ keys, torch.ones(3, dtype=torch.float64))
        ours = ours + solve(constraints, metric).delta
        metric = metric.plus(keys)
        close(ours, theirs)
    # And it is the minimum of sum ||W k - v||^2 + 40 tr((W - W0) C0 (W - W0)^T) + 2.5 ||W - W0||^2 over all nine facts.
    k, r = batch.keys, batch.residuals - weight @ batch.keys
    close(ours - weight, r @ k.T @ torch.linalg.inv(40 * c0 + 2.5 * EYE + k @ k.T))


def their_betaedit(projector, keys, residuals, past, c0):
    """BetaEdit's update as the paper and its code write it (arXiv:2605.09285), with lambda1 30 and lambda2 0.7."""
    system = projector @ (keys @ keys.T + past + 30 * c0) + 0.7 * EYE
    return torch.linalg.solve(system, projector @ keys @ residuals.T).T


def test_betaedit_is_its_formula_before_and_after_a_refresh():
    c0, batch = problem(4, slack=1)
    values = torch.linalg.eigvalsh(c0)
    threshold = float(values[7:9].mean())
    method = BetaEdit(covariance_weight=30.0, threshold=threshold, l2=0.7)
    metric = method.preservation(c0)
    past = torch.zeros(D_K, D_K, dtype=torch.float64)

    def projector(spanning):
        u, s, _ = torch.linalg.svd(spanning)
        return u[:, s < threshold] @ u[:, s < threshold].T

    assert int(projector(c0).trace().round()) == 8
    close(solve(batch, metric).delta, their_betaedit(projector(c0), batch.keys, batch.residuals, past, c0), 1e-10)
    earlier = 4 * torch.randn(D_K, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    past = earlier @ earlier.T
    expected = their_betaedit(projector(c0), batch.keys, batch.residuals, past, c0)
    close(solve(batch, metric.plus_moments(past)).delta, expected, 1e-10)
    fresh = projector((past / 5 + 30 * c0) / 31)
    assert 0 < int(fresh.trace().round()) < 8  # the past takes directions away
    expected = their_betaedit(fresh, batch.keys, batch.residuals, past, c0)
    close(solve(batch, method.refreshed(c0, past, 5).plus_moments(past)).delta, expected, 1e-10)
    assert (expected @ (EYE - fresh)).norm() < 1e-12  # nothing leaves the null space


def test_other_methods_are_never_refreshed():
    c0, _ = problem(1)
    assert [m.edits_between_refreshes for m in (MEMIT(), AlphaEdit(), BetaEdit(refresh_every=40))] == [0, 0, 40]
    assert torch.equal(MEMIT().refreshed(c0, c0, 3).factor, MEMIT().preservation(c0).factor)
