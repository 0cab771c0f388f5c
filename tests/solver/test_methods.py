"""Rules are a metric and a slack; their parameters are checked where they are given."""

import math

import pytest

from editlab.errors import UserError
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit


def test_slack_of_each_rule():
    # DESIGN's table: ROME 0, EMMET gamma, MEMIT 1, AlphaEdit its L2 term.
    assert [method.slack for method in (ROME(), EMMET(), EMMET(gamma=2.0), MEMIT(), AlphaEdit())] == [
        0,
        0,
        2,
        1,
        1,
    ]
    assert ROME().largest_batch == 1
    assert EMMET().largest_batch is None


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (EMMET, {"covariance_weight": 0.0}, "covariance_weight is 0"),
        (MEMIT, {"ridge": -1.0}, "ridge is -1"),
        (EMMET, {"gamma": -0.5}, "slack is -0.5"),
        (AlphaEdit, {"threshold": 0.0}, "threshold is 0"),
        (AlphaEdit, {"threshold": math.inf}, "threshold is inf: it must be finite"),
        (MEMIT, {"covariance_weight": math.inf}, "covariance_weight is inf: it must be finite"),
        (ROME, {"ridge": math.nan}, "ridge is nan"),
        (EMMET, {"gamma": math.nan}, "slack is nan; it must be 0 or above, and finite"),
        (EMMET, {"gamma": math.inf}, "slack is inf"),
        (AlphaEdit, {"l2": math.nan}, "slack is nan"),
    ],
)
def test_values_out_of_range_are_named(method, arguments, message):
    with pytest.raises(UserError, match=message):
        method(**arguments)
