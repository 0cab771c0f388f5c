"""The cost of a LoRA adjustment and of full fine-tuning: both kinds are trained, and their parameters are counted."""

import argparse

import pytest
from transformers import AutoConfig

from scripts.benchmark_lora import KINDS, measure


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_trained_and_counted(tiny_folder, kind):
    config = AutoConfig.from_pretrained(tiny_folder)
    inputs, outputs = config.intermediate_size, config.hidden_size
    # Two maps each: rank x (inputs + outputs), or all of inputs x outputs.
    expected = {"lora": 2 * 3 * (inputs + outputs), "full": 2 * inputs * outputs}
    options = argparse.Namespace(
        model=str(tiny_folder), targets="edited", layers=[0, 1], rank=3, batch_size=2, steps=2, kind=kind
    )
    found = measure(options)
    assert found["parameters"] == expected[kind]
    assert 0 < found["share"] < 1
    assert found["peak_mb"] > 0
    assert found["seconds"] > 0
