"""Tests of each check at both sides of the ends of its range, and of its exact message."""

import math
import sys

import pytest

from editlab.errors import UserError
from editlab.utils.validation import above_zero, at_least_one, decays, fractions, not_negative, one_of


@pytest.mark.parametrize(
    ("check", "inside", "outside", "what"),
    [
        (at_least_one, [1, 2, 1.5], [0, -3, 0.5, math.nan], "it must be at least 1"),
        (above_zero, [1e-30, 7, 1e300], [0, -0.1, math.nan], "it must be above 0"),
        (not_negative, [0, 0.0, 3], [-1, -1e-30, math.nan], "it must not be negative"),
        (fractions, [0, 0.5, 1], [-0.01, 1.01, math.nan], "it must lie between 0 and 1"),
        (decays, [1e-9, 0.5, 1], [0, 1.01, -1, math.nan], "it must be above 0 and at most 1"),
    ],
)
def test_ranges(check, inside, outside, what):
    for value in (*inside, None):
        check("model.values", size=value)
    for value in outside:
        with pytest.raises(UserError) as error:
            check("model.values", fine=None, size=value)
        assert str(error.value) == f"model.values.size is {value}: {what}."


@pytest.mark.parametrize("check", [at_least_one, above_zero, not_negative])
def test_infinity_is_rejected(check):
    with pytest.raises(UserError) as error:
        check("model", weight=math.inf)
    assert str(error.value) == "model.weight is inf: it must be finite."
    with pytest.raises(UserError) as error:
        check("model", weight=10**400)  # too large for a float, and for torch
    assert str(error.value) == f"model.weight has 1329 bits: it must be at most {sys.maxsize}."


def test_names():
    one_of("model", ("bare", "mean"), keys="mean")
    with pytest.raises(UserError) as error:
        one_of("model", ("bare", "mean"), keys="median")
    assert str(error.value) == "model.keys is 'median': it must be one of bare, mean."
