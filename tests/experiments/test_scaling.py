"""The table on paper: parameter counts against the published ones, costs against a model small enough for the hand."""

from pathlib import Path

import pytest

from editlab.experiments import scaling
from editlab.experiments.scaling import SHAPES, Shape

ROOT = Path(__file__).parents[2]


def test_parameters_are_the_published_ones():
    # The totals in the headers of the models' safetensors files.
    assert [shape.parameters for shape in SHAPES] == [6_738_415_616, 70_553_706_496, 405_853_388_800]


def test_costs_by_hand():
    shape = Shape("hand", blocks=4, d=2, d_ff=3, d_kv=1, vocabulary=5)
    assert shape.block == 8 + 4 + 18 + 4
    assert shape.forward(10) == 2 * 10 * 4 * 34
    # 112 prefix tokens through all blocks; 25 steps, forward and back, of 56 tokens through three and 13 x 5 logits.
    assert shape.value() == 2 * 112 * 136 + 25 * (2 * 2 * 56 * 102 + 2 * 2 * 13 * 5 * 2)
    assert shape.activations() == 512 * 3 * 2 * (20 + 12)
    assert (shape.metric(), shape.update()) == (8 * 9, 4 * 6)
    assert shape.moments() == pytest.approx(2 * 30 * 34 / scaling.RATE + 2 * 30 * 9 / scaling.RATE_64)
    assert scaling._gpus(shape) == 1


def test_the_page_has_the_table_as_it_is_printed():
    assert scaling.table() in (ROOT / "docs" / "how-to" / "several-devices.md").read_text()
