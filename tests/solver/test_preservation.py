"""A metric of blocks is the dense metric with these blocks on its diagonal; expected values are dense algebra."""

import pytest
import torch

from editlab.errors import EditLabError, UserError
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import EMMET, MEMIT, ROME, UltraEdit
from editlab.solver.preservation import Preservation


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def blocks():
    """Second moments of three blocks of four features."""
    keys = drawn(3, 4, 50)
    return keys @ keys.mT / 50


def dense(blocks, weight=1.0, ridge=1e-6, identity=0.0):
    """The matrix whose factor the metric should hold."""
    c = weight * torch.block_diag(*blocks)
    return c + (ridge * c.diagonal().mean() + identity) * torch.eye(12)


@pytest.mark.parametrize("identity", [0.0, 2.0])
def test_products_with_the_inverse(blocks, identity):
    metric = Preservation.from_moments(blocks, 3.0, identity=identity)
    c, keys, extra = dense(blocks, 3.0, identity=identity), drawn(12, 5, seed=1), drawn(12, 20, seed=2)
    torch.testing.assert_close(metric.unwhiten(metric.whiten(keys)), torch.linalg.solve(c, keys))
    torch.testing.assert_close(metric.inverse_times(keys), torch.linalg.solve(c, keys))
    weights = torch.arange(1.0, 21)
    more = metric.plus(extra, weights).plus(extra[:, :3])  # more columns than features: they are not folded
    c = c + extra @ torch.diag(weights.double()) @ extra.T + extra[:, :3] @ extra[:, :3].T
    torch.testing.assert_close(more.inverse_times(keys), torch.linalg.solve(c, keys))
    assert more.factor is metric.factor
    assert metric.bytes == 8 * 3 * 4 * 4


@pytest.mark.parametrize("method", [EMMET(2.0), ROME(2.0), MEMIT(2.0), UltraEdit(0.5)])
def test_the_update_is_that_of_the_dense_metric(blocks, method):
    constraints = Constraints(drawn(12, 3, seed=3), drawn(2, 3, seed=4), torch.full((3,), method.slack).double())
    whole = torch.block_diag(*blocks)
    expected, found = (solve(constraints, method.preservation(moments)).delta for moments in (whole, blocks))
    torch.testing.assert_close(found, expected)


def test_the_null_space_is_that_of_each_block(blocks):
    """Two directions of one block, one of another and none of the third lie under the threshold."""
    values, vectors = torch.linalg.eigh(blocks)
    values = torch.tensor([[0.0, 1e-6, 1, 2], [1e-5, 1, 1, 2], [1, 1, 1, 2]]).double()
    moments = vectors @ torch.diag_embed(values) @ vectors.mT
    metric, whole = (Preservation.null_space(m, 1e-3, identity=4.0) for m in (moments, torch.block_diag(*moments)))
    keys = drawn(12, 5, seed=5)
    torch.testing.assert_close(metric.inverse_times(keys), whole.inverse_times(keys))
    assert int(metric.factor.abs().sum(1).ne(0).sum()) == whole.factor.shape[1] == 3
    with pytest.raises(UserError, match=r"No eigenvalue .* is under 1e-09, .* \(they run from"):
        Preservation.null_space(blocks, 1e-9)


def test_one_bad_block_is_enough_to_refuse(blocks):
    blocks[1] -= 10 * torch.eye(4)
    with pytest.raises(EditLabError, match="not positive definite"):
        Preservation.from_moments(blocks)


def test_a_block_without_keys_is_preserved_by_the_ridge_alone(blocks):
    blocks[2] = 0
    metric = Preservation.from_moments(blocks, 3.0)
    torch.testing.assert_close(metric.factor[2] @ metric.factor[2].mT, dense(blocks, 3.0)[8:, 8:])
