"""Methods are a metric and a slack; their parameters are checked when an object is made."""

import math

import pytest
import torch

from editlab.errors import UserError
from editlab.solver.closed_form import solve
from editlab.solver.constraints import Constraints
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit, UltraEdit


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


def test_ultraedit_is_ridge_regression_on_the_keys():
    # The authors' code solves (H^T H + I) x = H^T V for the transposed update, with a key in each row of H.
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 4, dtype=torch.float64, generator=draw)
    residuals = torch.randn(3, 4, dtype=torch.float64, generator=draw)
    for mu in (1.0, 5.0):
        method = UltraEdit(mu)
        metric = method.preservation(torch.empty(7, 7, device="meta"), torch.device("cpu"))
        found = solve(Constraints(keys, residuals, torch.full((4,), method.slack, dtype=torch.float64)), metric).delta
        published = torch.linalg.solve(keys @ keys.T + mu * torch.eye(7), keys @ residuals.T).T
        assert (found - published).abs().max() < 1e-12
    assert not method.needs_moments


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
        (UltraEdit, {"mu": 0.0}, "mu is 0"),
        (EMMET, {"gram_ridge": math.nan}, "slack is nan; it must be 0 or above, and finite"),
        (EMMET, {"gram_ridge": math.inf}, "slack is inf"),
        (AlphaEdit, {"l2": math.nan}, "slack is nan"),
    ],
)
def test_values_out_of_range_are_named(method, arguments, message):
    with pytest.raises(UserError, match=message):
        method(**arguments)
