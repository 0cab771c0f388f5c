"""The closed form against each method's own textbook formula, in float64, and its behaviour at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editlab.errors import EditLabError
from editlab.solver.closed_form import effective_weight, solve
from editlab.solver.constraints import Constraints, duplicate_tolerance
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit
from editlab.solver.preservation import Preservation

D_K, D_V = 12, 7


def problem(n, seed=0, slack=0.0):
    """Random SPD moments (well conditioned), keys and residuals in float64."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(D_K, 3 * D_K, generator=generator, dtype=torch.float64)
    c0 = root @ root.T / (3 * D_K)
    keys = torch.randn(D_K, n, generator=generator, dtype=torch.float64)
    residuals = torch.randn(D_V, n, generator=generator, dtype=torch.float64)
    return c0, Constraints(keys, residuals, torch.full((n,), float(slack), dtype=torch.float64))


def close(a, b, tolerance=1e-12):
    assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b), float((a - b).norm() / b.norm())


def test_rome_is_its_rank_one_formula():
    # ROME (arXiv:2202.05262, eq. 2): W + Lambda (C^-1 k*)^T with Lambda = (v* - W k*) / ((C^-1 k*)^T k*).
    c0, one = problem(1)
    direction = torch.linalg.inv(c0) @ one.keys
    expected = one.residuals @ direction.T / (direction.T @ one.keys)
    close(solve(one, ROME(ridge=1e-15).preservation(c0)).delta, expected)


def test_memit_is_its_normal_equations():
    # MEMIT (arXiv:2210.07229, eq. 14): delta = R K^T (lambda C0 + K K^T)^-1.
    c0, batch = problem(5, slack=1)
    expected = batch.residuals @ batch.keys.T @ torch.linalg.inv(30.0 * c0 + batch.keys @ batch.keys.T)
    close(solve(batch, MEMIT(covariance_weight=30.0, ridge=1e-15).preservation(c0)).delta, expected)


def test_emmet_is_the_kkt_system():
    # The minimizer of tr(delta C delta^T) s.t. delta K = R from its KKT system, solved as one dense block system.
    c0, batch = problem(5)
    n = len(batch)
    kkt = torch.zeros(D_K + n, D_K + n, dtype=torch.float64)
    kkt[:D_K, :D_K], kkt[:D_K, D_K:], kkt[D_K:, :D_K] = c0, batch.keys, batch.keys.T
    right = torch.zeros(D_K + n, D_V, dtype=torch.float64)
    right[D_K:] = batch.residuals.T
    expected = torch.linalg.solve(kkt, right)[:D_K].T
    delta = solve(batch, EMMET(ridge=1e-15).preservation(c0)).delta
    close(delta, expected)
    close(delta @ batch.keys, batch.residuals)


def test_alphaedit_is_its_projected_formula():
    # AlphaEdit (arXiv:2410.02355): delta = R K^T P (K K^T P + I)^-1 with P the projector on the null space.
    c0, batch = problem(4, slack=1)
    values, vectors = torch.linalg.eigh(c0)
    threshold = float(values[5:7].mean())
    basis = vectors[:, values < threshold]
    projector = basis @ basis.T
    expected = (
        batch.residuals
        @ batch.keys.T
        @ projector
        @ torch.linalg.inv(batch.keys @ batch.keys.T @ projector + torch.eye(D_K, dtype=torch.float64))
    )
    close(solve(batch, AlphaEdit(threshold=threshold).preservation(c0)).delta, expected)


@pytest.mark.parametrize("m", [3, 11])  # 3 stay as columns; 11 > d_k / 2 are folded into a new factor
@pytest.mark.parametrize("basis", [False, True])
def test_past_keys_in_the_metric(m, basis):
    # C + w sum k k^T written out and factored from scratch; for AlphaEdit with the projector on both sides.
    c0, batch = problem(4, slack=0.5)
    past = torch.randn(D_K, m, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if basis:
        values, vectors = torch.linalg.eigh(c0)
        threshold = float(values[8:10].mean())
        u = vectors[:, values < threshold]
        inverse = u @ torch.linalg.inv(torch.eye(u.shape[1]) + 2.5 * u.T @ past @ past.T @ u) @ u.T
        metric = Preservation.null_space(c0, threshold)
    else:
        inverse = torch.linalg.inv(c0 + 2.5 * past @ past.T)
        metric = Preservation.from_moments(c0, ridge=1e-15)
    k = batch.keys
    expected = batch.residuals @ torch.linalg.inv(k.T @ inverse @ k + 0.5 * torch.eye(4)) @ k.T @ inverse
    close(solve(batch, metric.plus(past, 2.5)).delta, expected)
    halves = metric.plus(past[:, :2], 2.5).plus(past[:, 2:], torch.full((m - 2,), 2.5))
    close(solve(batch, halves).delta, expected)


def test_a_preserved_key_is_a_constraint_with_no_residual():
    # beta k k^T in the metric and the constraint "delta k = 0 with slack 1/beta" are the same quadratic term.
    c0, batch = problem(4, slack=0.3)
    metric = Preservation.from_moments(c0)
    still = torch.randn(D_K, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    as_constraints = Constraints(
        torch.cat([batch.keys, still], 1),
        torch.cat([batch.residuals, torch.zeros(D_V, 2, dtype=torch.float64)], 1),
        torch.cat([batch.slack, torch.full((2,), 1 / 7.0, dtype=torch.float64)]),
    )
    close(solve(as_constraints, metric).delta, solve(batch, metric.plus(still, 7.0)).delta)


def test_sequence_with_past_keys_equals_one_joint_batch():
    # Minimizing tr(D C0 D^T) + sum ||D k - r||^2 all at once, or in two steps whose second keeps the first's keys
    # in its metric: for a quadratic, the second step from the first's optimum lands on the joint optimum, when the
    # second solve's residual is taken against the weights after the first step.
    c0, batch = problem(6, slack=1)
    metric = Preservation.from_moments(c0, ridge=1e-15)
    joint = solve(batch, metric).delta
    first, second = batch.subset(torch.arange(3)), batch.subset(torch.arange(3, 6))
    delta_1 = solve(first, metric).delta
    second = Constraints(second.keys, second.residuals - delta_1 @ second.keys, second.slack)
    delta_2 = solve(second, metric.plus(first.keys)).delta
    close(delta_1 + delta_2, joint)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scaling_the_metric_changes_nothing_when_hard(scale, seed):
    c0, batch = problem(4, seed)
    close(
        solve(batch, Preservation.from_moments(c0, scale)).delta,
        solve(batch, Preservation.from_moments(c0)).delta,
        1e-8,
    )


def test_emmet_with_a_slack_is_memit_at_slack_times_lambda():
    c0, batch = problem(4)
    emmet = EMMET(covariance_weight=20.0, gram_ridge=0.75)
    memit = MEMIT(covariance_weight=15.0)
    slack = torch.full((4,), emmet.slack, dtype=torch.float64)
    assert effective_weight(slack, emmet.weight) == 15.0
    soft = Constraints(batch.keys, batch.residuals, slack)
    ones = Constraints(batch.keys, batch.residuals, torch.ones(4, dtype=torch.float64))
    close(solve(soft, emmet.preservation(c0)).delta, solve(ones, memit.preservation(c0)).delta)


@pytest.mark.parametrize("firmness", [1 / 64, 1.0, 1024.0])
@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_a_firm_solve_is_the_dense_one_with_the_slack_raised(slack, firmness):
    c0, some = problem(5, slack=slack)
    inverse = torch.linalg.inv(c0)
    gram = some.keys.T @ inverse @ some.keys
    raised = firmness * gram.diagonal().mean()
    system = gram + (slack + raised) * torch.eye(5, dtype=torch.float64)
    expected = some.residuals @ torch.linalg.inv(system) @ some.keys.T @ inverse
    found = solve(some, MEMIT(covariance_weight=1.0, ridge=1e-15).preservation(c0), firmness=firmness)
    close(found.delta, expected, 1e-11)
    assert found.firm_slack == pytest.approx(float(raised))


def test_of_all_updates_of_its_norm_a_firm_one_leaves_the_least_residual():
    # Scaling the plain update to the same norm in the metric leaves more; and one fact is divided by 1 + firmness.
    c0, some = problem(5)
    metric = MEMIT(covariance_weight=1.0, ridge=1e-15).preservation(c0)
    plain, firm = solve(some, metric).delta, solve(some, metric, firmness=0.5).delta
    norms = [float(torch.trace(delta @ c0 @ delta.T).sqrt()) for delta in (plain, firm)]
    scaled = plain * norms[1] / norms[0]
    left = [float((delta @ some.keys - some.residuals).norm()) for delta in (firm, scaled)]
    assert norms[1] < norms[0]
    assert left[0] < left[1]
    c0, one = problem(1)
    metric = ROME(ridge=1e-15).preservation(c0)
    close(solve(one, metric, firmness=3.0).delta, solve(one, metric).delta / 4)


def test_a_sequence_with_a_firm_batch_is_one_joint_batch():
    # The second batch was firm, so its past keys weigh 1 / (slack + what was added); then the third is solved.
    c0, some = problem(9, slack=1.0)
    metric = MEMIT(covariance_weight=1.0, ridge=1e-15).preservation(c0)
    total, slack, past = torch.zeros(D_V, D_K, dtype=torch.float64), some.slack.clone(), metric
    for start, firmness in ((0, 0.0), (3, 2.0), (6, 0.0)):
        keys = some.keys[:, start : start + 3]
        own = Constraints(keys, some.residuals[:, start : start + 3] - total @ keys, torch.ones(3).double())
        found = solve(own, past, firmness=firmness)
        total = total + found.delta
        slack[start : start + 3] += found.firm_slack
        past = past.plus(keys, 1 / (1 + found.firm_slack))
    joint = solve(Constraints(some.keys, some.residuals, slack), metric).delta
    close(total, joint, 1e-10)


@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_a_hard_replayed_constraint_gives_way_to_an_edit_of_its_key(slack):
    c0, batch = problem(3, slack=slack)
    optional = torch.tensor([False] * len(batch) + [True])
    beside = Constraints(
        torch.cat([batch.keys, batch.keys[:, :1]], 1),
        torch.cat([batch.residuals, -3 * batch.residuals[:, :1]], 1),
        torch.cat([batch.slack, torch.zeros(1, dtype=torch.float64)]),
        optional,
    )
    metric = Preservation.from_moments(c0)
    close(solve(beside, metric).delta, solve(batch, metric).delta)  # as if it were not there
    # Where all on a key are replayed, the hard one holds: -3 r; of two hard ones, r and -3 r, the mean.
    alone = Constraints(beside.keys, beside.residuals, beside.slack, torch.ones(len(optional), dtype=torch.bool))
    held = solve(alone, metric).delta @ batch.keys[:, 0]
    close(held, (-3 if slack else -1) * batch.residuals[:, 0].double(), 1e-6)


@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_duplicate_keys_are_averaged(slack):
    # Two wishes for one key: least squares with both rows is solved naively (soft), or asks for the mean (hard).
    c0, batch = problem(3, slack=slack)
    twice = Constraints(
        torch.cat([batch.keys, batch.keys[:, :1] * (1 + 1e-9)], 1),
        torch.cat([batch.residuals, -3 * batch.residuals[:, :1]], 1),
        torch.cat([batch.slack, batch.slack[:1]]),
    )
    solution = solve(twice, Preservation.from_moments(c0, ridge=1e-15))
    assert solution.merged == 1
    assert "averaged" in solution.notes[0]
    if slack:
        k, w = twice.keys, 1 / slack
        expected = w * twice.residuals @ k.T @ torch.linalg.inv(c0 + w * k @ k.T)
        close(solution.delta, expected, 1e-8)
    else:
        close(solution.delta @ batch.keys[:, :1], -batch.residuals[:, :1], 1e-8)  # (1 - 3) / 2 = -1


def test_a_hard_constraint_overrides_a_soft_one_on_its_key():
    c0, batch = problem(2)
    both = Constraints(
        batch.keys[:, [0, 0, 1]],
        torch.stack([batch.residuals[:, 0], batch.residuals[:, 0] * 9, batch.residuals[:, 1]], 1),
        torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
    )
    close(
        solve(both, Preservation.from_moments(c0)).delta,
        solve(batch, Preservation.from_moments(c0)).delta,
        1e-8,
    )


def near_duplicates(gap):
    """Two hard constraints whose keys differ by ``gap`` (above the merging tolerance), so cond is about gap^-2."""
    c0, batch = problem(3)
    other = torch.randn(D_K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    keys = batch.keys.clone()
    keys[:, 1] = keys[:, 0] + gap * other
    return c0, Constraints(keys, batch.residuals, batch.slack)


def test_the_condition_limit_raises_the_slack_and_the_solution_reports_it():
    c0, batch = near_duplicates(1e-4)
    solution = solve(batch, Preservation.from_moments(c0), condition_limit=1e6)
    assert solution.condition <= 1e6
    assert solution.raised_slack > 0
    assert "slack raised" in solution.notes[0]


def test_replayed_constraints_are_dropped_before_least_squares():
    c0, batch = near_duplicates(1e-4)
    batch.optional = torch.tensor([False, True, False])
    solution = solve(batch, Preservation.from_moments(c0), condition_limit=1e3)
    assert solution.dropped == 1
    assert not solution.least_squares
    close(solution.delta @ batch.keys[:, [0, 2]], batch.residuals[:, [0, 2]], 1e-8)


def test_least_squares_is_the_last_resort():
    c0, batch = near_duplicates(1e-4)
    solution = solve(batch, Preservation.from_moments(c0), condition_limit=1.5)
    assert solution.least_squares
    assert torch.isfinite(solution.delta).all()


def test_more_hard_constraints_than_dimensions():
    # No update can meet 20 equalities in 12 dimensions; the answer stays finite and the notes say what was done.
    c0, batch = problem(20)
    solution = solve(batch, Preservation.from_moments(c0))
    assert torch.isfinite(solution.delta).all()
    assert solution.notes
    assert 0 < solution.residual < 1


def test_no_constraints_no_change():
    c0, batch = problem(0)
    solution = solve(batch, Preservation.from_moments(c0))
    assert solution.delta.shape == (D_V, D_K)
    assert not solution.delta.any()


def test_bad_inputs():
    c0, batch = problem(2)
    with pytest.raises(ValueError, match="negative"):
        Constraints(batch.keys, batch.residuals, -torch.ones(2))
    with pytest.raises(ValueError, match="2 keys"):
        Constraints(batch.keys, batch.residuals[:, :1], batch.slack)
    batch.residuals[0, 0] = float("nan")
    with pytest.raises(EditLabError, match="not finite"):
        solve(batch, Preservation.from_moments(c0))
    with pytest.raises(EditLabError, match="positive definite"):
        Preservation.from_moments(-c0)
    with pytest.raises(EditLabError, match="not finite"):
        Preservation.from_moments(c0 * float("inf"))
    with pytest.raises(EditLabError, match="null space is empty"):
        Preservation.null_space(c0, 1e-9)


def test_the_factor_is_computed_in_one_matrix_and_the_moments_do_not_change():
    a = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = a @ a.T
    before = moments.clone()
    metric = Preservation.from_moments(moments, 3.0, 1e-6)
    assert torch.equal(moments, before)
    c = 3.0 * moments
    c.diagonal().add_(1e-6 * c.diagonal().mean())
    assert torch.equal(metric.factor, torch.linalg.cholesky(c))
    assert metric.bytes == 8 * 7 * 7


def test_memory_that_suffices_is_not_given_up_for_an_error_of_another_kind():
    with pytest.raises(EditLabError, match="not positive definite"):
        Preservation.from_moments(-torch.eye(3, dtype=torch.float64))


def test_keys_that_differ_by_bfloat16_rounding_are_merged_only_with_its_tolerance():
    keys = torch.tensor([[1.0, 1.0], [0.0, 0.01]], dtype=torch.float64)
    constraints = Constraints(keys, torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.zeros(2).double())
    assert len(constraints.merged()) == 2
    assert len(constraints.merged(duplicate_tolerance(2.0**-7))) == 1
    assert duplicate_tolerance(1e-7) == 1e-5
    metric = Preservation.from_moments(torch.eye(2, dtype=torch.float64))
    assert solve(constraints, metric, same_key=0.0156).merged == 1
