"""The laws by hand, the file that ships, and what counts as outside of the measured rows."""

import json
import math

import pytest
import torch

from editlab.edits.calibration import SHIPPED, Calibration
from editlab.edits.forecast import Candidate, Forecast
from editlab.errors import EditLabError
from tests.edits.made_up_laws import laws, row


def forecast(held=(1.0, 0.5), crosstalk=(0.0, 0.1), harm=0.1, edits=100, drift=0.0, **changes):
    candidate = Candidate(**{"layers": (1, 2), "weight": 1000.0, "context_weight": 0.0, "memory": True, **changes})
    each = torch.tensor([held, crosstalk]).double()
    return Forecast(candidate, edits, 2, *each, drift, harm, (0.1, 0.2))


def test_accuracy_by_hand():
    # Odds exp(2) of the first edit, exp(2 - .3) / 2 of the second.
    first, second = math.exp(2), math.exp(1.7) / 2
    expected = (first / (1 + first) + second / (1 + second)) / 2
    law = laws().accuracy
    assert law(forecast()) == pytest.approx(expected)
    first, second = math.exp(1.9), math.exp(1.6) / 2  # a drift of .2 at weight .5
    assert law(forecast(drift=0.2)) == pytest.approx((first / (1 + first) + second / (1 + second)) / 2)
    assert law.range(forecast()) == pytest.approx((expected - 0.05, expected + 0.05))
    assert law.range(forecast(held=(1e6, 1e6)))[1] == 1.0
    assert 0 < law(forecast(held=(-0.3, 0.0))) < 0.1  # an edit that others turn around has a chance, too


def test_perplexity_by_hand():
    law = laws().perplexity
    assert law(0.1) == pytest.approx(math.exp(0.2))
    # An error of half of (0.2 + 0.01), to both sides of 0.2; near 0 the floor alone is left.
    assert law.range(0.1) == pytest.approx((math.exp(0.095), math.exp(0.305)))
    assert law.range(0.0) == pytest.approx((1.0, math.exp(0.005)))
    assert law.harm(math.exp(0.2)) == pytest.approx(0.1)
    assert law(0.0) == 1.0
    assert law(1e9) < math.inf


def test_what_was_not_measured_is_named():
    # The rows have 4 to 1000 edits, lambda 300 to 1000, two layers, context keys 0 to 1.
    assert laws().outside(forecast()) == []
    assert laws().outside(forecast(edits=2000)) == ["edits 2000 (measured: 4 to 1000)"]
    found = laws().outside(forecast(layers=(2,), weight=10.0, context_weight=2.0))
    assert found == ["lambda 10 (measured: 300 to 1000)", "layers 1 (measured: 2)",
                     "lowest layer 2 (measured: 1)", "context-key weight 2 (measured: 0 to 1)"]  # fmt: skip


def test_the_nearest_rows_come_first():
    rows = [row(100, memory=False), row(800), row(100, 300.0), row(100, layers=(2,))]
    # Distances: 2 for the memory; 3 octaves of edits; half of log2(10 / 3) = .87; one of two layers, .5.
    assert laws(rows=rows).nearest(forecast(), 4) == [rows[3], rows[2], rows[0], rows[1]]
    assert len(laws(rows=rows).nearest(forecast())) == 3


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "laws.json"
    path.write_text(laws("abc").text())
    assert Calibration.load(path) == laws("abc")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"accuracy": {"intercept": 1}}'])
def test_errors_of_a_damaged_file(tmp_path, content):
    (tmp_path / "laws.json").write_text(content)
    with pytest.raises(EditLabError, match="install editlab again"):
        Calibration.load(tmp_path / "laws.json")


def test_the_shipped_laws_reward_what_is_held_and_punish_harm():
    shipped, content = Calibration.load(), json.loads(SHIPPED.read_text())
    usual = forecast(held=(0.8, 0.8), crosstalk=(0.1, 0.1), harm=0.03)
    assert shipped.accuracy(forecast(held=(0.9, 0.8))) > shipped.accuracy(forecast(held=(0.7, 0.8)))
    assert shipped.accuracy(forecast(crosstalk=(0.1, 0.1))) > shipped.accuracy(forecast(crosstalk=(0.3, 0.1)))
    assert 0 < shipped.accuracy.error < 0.25
    assert 0.7 < shipped.accuracy(usual) < 1
    assert 0.7 < shipped.perplexity.power < 1.5  # second order in the change, so near 1 in its mean square
    assert shipped.perplexity(shipped.perplexity.harm(1.1)) == pytest.approx(1.1)
    assert {"tables", "revision", "machine"} <= content["provenance"].keys()
    assert len({one.candidate for one in shipped.rows}) >= 4
