"""The dry solve against updates that are really made: naive sequences of the textbook formula, in float64."""

import pytest
import torch

from editlab.solver.dry_solve import DryLayer, DrySettings, dry_solve, residual_statistics

D_K, D_V, EDITS = 12, 7, 10
RIDGE = 1e-6


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed=0, tokens=2):
    """Random moments, keys and context keys of :data:`EDITS` facts."""
    root = random(seed, D_K, 3 * D_K)
    fact = torch.arange(EDITS).repeat_interleave(tokens)
    context = random(seed + 2, D_K, tokens * EDITS)
    return DryLayer(random(seed + 1, D_K, EDITS), context, fact, root @ root.T / (3 * D_K))


def metric(one, weight, mu=0.0):
    """Lambda C0 + mu I + the ridge, dense."""
    identity = torch.eye(D_K, dtype=torch.float64)
    return weight * (one.moments + RIDGE * one.moments.diagonal().mean() * identity) + mu * identity


def sequence(layers, residuals, settings, batch_size):
    """The sum of updates of each layer, batch after batch by the formula with dense inverses; oracle."""
    sums = [torch.zeros(len(residuals), D_K, dtype=torch.float64) for _ in layers]
    past = [torch.zeros(D_K, D_K, dtype=torch.float64) for _ in layers]
    for start in range(0, EDITS, batch_size):
        batch = slice(start, min(start + batch_size, EDITS))
        for index, one in enumerate(layers):
            moved = sum(w @ other.keys[:, batch] for w, other in zip(sums, layers, strict=True))
            wanted = (residuals[:, batch] - moved) / (len(layers) - index)
            keys = one.keys[:, batch]
            inside = (one.context_fact >= batch.start) & (one.context_fact < batch.stop)
            context = one.context_keys[:, inside]
            now = metric(one, settings.weight, settings.mu) + settings.context_weight * context @ context.T
            if settings.memory:
                now = now + past[index]
            solved = torch.linalg.inv(now) @ keys
            gram = keys.T @ solved + settings.slack * torch.eye(keys.shape[1], dtype=torch.float64)
            sums[index] = sums[index] + wanted @ torch.linalg.inv(gram) @ solved.T
            past[index] = past[index] + keys @ keys.T / settings.slack + settings.context_weight * context @ context.T
    return sums


def close(found, expected, tolerance=1e-8):
    assert torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("batch_size", [1, 3, EDITS])
def test_a_sequence_with_memory_is_one_joint_solve_is_the_predicted_fraction(batch_size):
    one, residuals = layer(), random(9, D_V, EDITS)
    settings = DrySettings(weight=3.0, memory=True, slack=0.5, mu=0.2)
    (update,) = sequence([one], residuals, settings, batch_size)
    gram = one.keys.T @ torch.linalg.inv(metric(one, 3.0, 0.2)) @ one.keys
    # The joint solve: R (G + S)^-1 K^T C^-1 in one batch; what it does at the keys is R G (G + S)^-1.
    inner = torch.linalg.inv(gram + 0.5 * torch.eye(EDITS, dtype=torch.float64))
    joint = residuals @ inner @ one.keys.T @ torch.linalg.inv(metric(one, 3.0, 0.2))
    close(update, joint)
    predicted = gram @ inner
    close(update @ one.keys, residuals @ predicted)
    (outcome,) = dry_solve([one], settings, batch_size)
    close(outcome.held, predicted.diagonal())
    close(outcome.crosstalk, predicted.fill_diagonal_(0).norm(dim=0))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("context_weight", [0.0, 0.7])
def test_updates_of_a_dry_solve_are_those_of_the_residuals(layers, memory, context_weight):
    # With as many outputs as facts and R = I, a sequence returns the coefficients themselves.
    stack = [layer(10 * index) for index in range(layers)]
    settings = DrySettings(weight=2.0, context_weight=context_weight, memory=memory)
    halves = dry_solve(stack, settings, 5, at=(5,))
    assert [outcome.edits for outcome in halves] == [5, EDITS]
    identity = torch.eye(EDITS, dtype=torch.float64)
    sums = sequence(stack, identity, settings, 5)
    moved = sum(total @ one.keys for total, one in zip(sums, stack, strict=True))
    outcome = halves[-1]
    close(outcome.held, moved.diagonal())
    close(outcome.crosstalk, moved.clone().fill_diagonal_(0).norm(dim=0))
    spent = [float(((total @ one.moments) * total).sum()) for total, one in zip(sums, stack, strict=True)]
    assert outcome.spent == pytest.approx(spent, rel=1e-8)
    drifts = sum(total @ one.context_keys for total, one in zip(sums, stack, strict=True)).square().sum(0)
    assert outcome.drift == pytest.approx(float(drifts.mean().sqrt()), rel=1e-8)


def test_expected_crosstalk_and_harm_of_residuals_that_are_alike():
    # Residuals sqrt(1 - c) g_i + sqrt(c) g have mean square 1 (over d_v outputs of variance 1 / d_v) and cosine c.
    one, settings, alike = layer(), DrySettings(weight=2.0), 0.4
    (outcome,) = dry_solve([one], settings, 5, alike)
    drawn = 4000
    own, common = random(1, drawn, D_V, EDITS), random(2, drawn, D_V, 1)
    residuals = (0.6**0.5 * own + 0.4**0.5 * common) / D_V**0.5
    flat = residuals.reshape(-1, EDITS)
    (sums,) = sequence([one], torch.eye(EDITS, dtype=torch.float64), settings, 5)
    drifts = (flat @ sums @ one.context_keys).square().sum() / (drawn * one.context_keys.shape[1])
    assert outcome.drift**2 == pytest.approx(float(drifts), rel=0.05)
    added = flat @ (sums @ one.keys).fill_diagonal_(0)
    harms = float(((flat @ sums @ one.moments) * (flat @ sums)).sum()) / drawn
    assert torch.allclose(outcome.crosstalk.square(), added.square().sum(0) / drawn, rtol=0.05)
    assert outcome.spent[0] == pytest.approx(harms, rel=0.05)


def test_one_edit_by_hand():
    # k^T C^-1 k = 4 / 2 = 2, slack 1: held 2/3. A = (2 + 1)^-1 k^T C^-1 = (1/3) (1, 0), and with C0 = I
    # text pays 1/9.
    moments = torch.eye(2, dtype=torch.float64)
    keys = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    none = torch.zeros(2, 0, dtype=torch.float64)
    one = DryLayer(keys, none, torch.zeros(0, dtype=torch.long), moments)
    (outcome,) = dry_solve([one], DrySettings(weight=2.0, ridge=0.0), 1)
    assert outcome.held.tolist() == pytest.approx([2 / 3])
    assert outcome.crosstalk.tolist() == [0]
    assert outcome.spent == pytest.approx((1 / 9,))
    assert outcome.drift == 0


def test_crowding_and_batches():
    one = layer(tokens=0)
    alone = dry_solve([one.first(1)], DrySettings(weight=1.0, memory=True), 1)[0].held[0]
    crowded = dry_solve([one], DrySettings(weight=1.0, memory=True), 2)[0].held
    assert crowded[0] < alone
    assert one.first(3).keys.shape == (D_K, 3)
    batches = []
    dry_solve([one], DrySettings(weight=1.0), 4, at=(6, 99), tick=batches.append)
    assert batches == [4, 2, 4]


def test_statistics_of_residuals_by_hand():
    # Norms 5 and 5, product 15 + 0 = 15 ... (3, 4) and (5, 0): mean square 25, the one pair 15 / 25.
    assert residual_statistics(torch.tensor([[3.0, 5.0], [4.0, 0.0]])) == (25.0, pytest.approx(0.6))
    assert residual_statistics(torch.tensor([[3.0], [4.0]])) == (25.0, 0.0)
    assert residual_statistics(torch.tensor([[1.0, -1.0]]).double()) == (1.0, 0.0)  # opposite ones count as unlike
