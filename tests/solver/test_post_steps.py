"""Post-steps against a direct transcription of each paper's formula, in float64, and on matrices worked by hand."""

import math

import pytest
import torch

from editlab.errors import UserError
from editlab.solver.post_steps import PRUNE, RECT, REVIVE, SPHERE, EditedWeight, apply_all

D_V, D_K = 7, 12


def matrix(seed, scale=1.0):
    return scale * torch.randn(D_V, D_K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weight():
    return EditedWeight(matrix(1), matrix(2, 0.3))


@pytest.fixture
def update():
    return matrix(3)


def close(a, b):
    assert torch.linalg.norm(a - b) <= 1e-12 * torch.linalg.norm(b)


@pytest.mark.parametrize("of", ["original", "current"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_sphere_is_its_formula(weight, update, ratio, of):
    # arXiv:2510.01172: rows of length 1, C = W^T W / d_v, its eigenvectors from the largest eigenvalue down, as many as
    # there are cumulative shares up to the ratio, and one more; P = I - strength U U^T.
    rows = weight.original if of == "original" else weight.original + weight.total
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows / D_V)
    count = int((values.flip(0).cumsum(0) / values.sum() <= ratio).sum()) + 1
    u = vectors[:, -count:]
    expected = update @ (torch.eye(D_K, dtype=torch.float64) - 0.8 * u @ u.T)
    step = SPHERE(ratio=ratio, strength=0.8, of=of)
    close(step.apply(update, weight), expected)
    close(step.apply(update, weight), expected)  # with the directions that were kept


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.99])
def test_revive_is_its_filter_of_coefficients(weight, update, energy):
    # Every coefficient u_i^T delta v_j in full bases, one by one.
    u, s, vt = torch.linalg.svd(weight.original, full_matrices=True)
    total, r = 0.0, 0
    while total < energy * float((s**2).sum()):
        total += float(s[r] ** 2)
        r += 1
    expected = torch.zeros_like(update)
    for i in range(D_V):
        for j in range(D_K):
            if i >= r and j >= r:
                expected += (u[:, i] @ update @ vt[j]) * torch.outer(u[:, i], vt[j])
    got = REVIVE(energy=energy).apply(update, weight)
    assert torch.linalg.norm(got - expected) <= 1e-12 * torch.linalg.norm(update)  # at .99 next to nothing is left
    edited = weight.original + got
    for i in range(r):  # the first r triplets are still triplets
        close(edited @ vt[i], s[i] * u[:, i])
        close(u[:, i] @ edited, s[i] * vt[i])


@pytest.mark.parametrize("base", [math.e, 1.2])
def test_prune_is_its_function_of_singular_values(weight, update, base):
    # arXiv:2405.16821: F(s) = log_a(s) - log_a(s_max) + s_max for s above s_max = the largest singular value of W0.
    def restrained(delta, limit):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        f = [math.log(x, base) - math.log(limit, base) + limit if x > limit else x for x in s.tolist()]
        return u @ torch.diag(torch.tensor(f, dtype=torch.float64)) @ vt

    original, big = float(torch.linalg.svdvals(weight.original)[0]), 3 * update
    expected = restrained(weight.total + big, original)
    close(PRUNE(base=base).apply(big, weight), expected - weight.total)
    current = float(torch.linalg.svdvals(weight.original + weight.total)[0])
    close(PRUNE(base=base, of="update").apply(big, weight), restrained(big, current))


def test_prune_by_hand():
    # s_max of the weight is 2; of the update's 2e and .5 the first becomes ln 2e - ln 2 + 2 = 3.
    weight = EditedWeight(torch.diag(torch.tensor([2.0, 1.0]).double()), torch.zeros(2, 2).double())
    update = torch.diag(torch.tensor([2 * math.e, 0.5], dtype=torch.float64))
    close(PRUNE().apply(update, weight), torch.diag(torch.tensor([3.0, 0.5]).double()))
    assert torch.equal(PRUNE().apply(update / 4, weight), update / 4)  # no singular value is above 2


def test_rect_keeps_the_relatively_largest_elements():
    # Relative changes by hand: 1, 4, .5, 2 (of -2 on 1), 0 (of 0 on 0), infinite (of 1 on 0).
    weight = EditedWeight(torch.tensor([[1.0, 1.0, 2.0], [0.5, 0.0, 0.0]]).double(),
                          torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]).double())  # fmt: skip
    update = torch.tensor([[1.0, 4.0, 1.0], [-2.0, 0.0, 1.0]]).double()
    kept = [[0.0, 4.0, 0.0], [-2.0, 0.0, 1.0]]
    assert RECT(fraction=0.5).apply(update, weight).tolist() == kept
    assert RECT(fraction=0.4).apply(update, weight).tolist() == kept  # 2.4 elements are rounded up
    assert torch.equal(RECT(fraction=1.0).apply(update, weight), update)


@pytest.mark.parametrize("fraction", [0.2, 0.4, 1 / 84])
def test_rect_is_a_sort(weight, update, fraction):
    ratios = (update / (weight.original + weight.total)).abs()
    best = ratios.flatten().argsort(descending=True)[: math.ceil(fraction * ratios.numel())]
    expected = torch.zeros(D_V * D_K, dtype=torch.float64)
    expected[best] = update.flatten()[best]
    assert torch.equal(RECT(fraction=fraction).apply(update, weight), expected.reshape(D_V, D_K))


def test_post_steps_follow_each_other(weight, update):
    first, second = SPHERE(), RECT(0.3)
    expected = second.apply(first.apply(update, weight), weight)
    assert torch.equal(apply_all([first, second], update, weight), expected)
    assert not torch.equal(apply_all([second, first], update, weight), expected)
    assert apply_all([], update, weight) is update


@pytest.mark.parametrize(
    ("step", "arguments", "message"),
    [
        (SPHERE, {"ratio": 1.5}, "SPHERE.ratio is 1.5: it must lie between 0 and 1"),
        (SPHERE, {"strength": 0.0}, "SPHERE.strength is 0.0: it must be above 0"),
        (SPHERE, {"of": "both"}, "SPHERE.of is 'both': it must be one of original, current"),
        (REVIVE, {"energy": 0.0}, "REVIVE.energy is 0.0"),
        (REVIVE, {"energy": 1.0}, "the whole weight would be protected"),
        (PRUNE, {"base": 1.0}, "PRUNE.base is 1.0: the base of a logarithm must be above 1"),
        (PRUNE, {"base": math.nan}, "PRUNE.base is nan"),
        (PRUNE, {"of": "weight"}, "PRUNE.of is 'weight'"),
        (RECT, {"fraction": 0.0}, "RECT.fraction is 0.0"),
    ],
)
def test_errors_name_the_setting(step, arguments, message):
    with pytest.raises(UserError, match=message):
        step(**arguments)
