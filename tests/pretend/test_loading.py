"""Tests of wrapping a model while the accelerator is the default device, as in Lightning, and with TF32 products."""

import pytest
import torch

from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from editlab.lm.precision import rounding
from editlab.solver.constraints import Constraints, duplicate_tolerance
from tests.facts import FACTS
from tests.pretend.device import pretend
from tests.pretend.editing import on_device
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = on_device


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_device_may_be_the_default_one(kind, family):
    with pretend(kind) as device:
        model = tiny_model(family).to(device.name)
        with torch.device(device.name):
            assert LanguageModel(model, tiny_tokenizer()).packs


def test_tf32_does_not_reject_a_model(monkeypatch):
    with pretend(tf32=True) as device:
        model = tiny_model("llama").to(device.name)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert rounding(torch.float32, device.name) == 2**-10
        assert LanguageModel(model, tiny_tokenizer()).packs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_key_read_in_two_bfloat16_passes_is_one_key(family):
    lm = LanguageModel(tiny_model(family).bfloat16(), tiny_tokenizer())
    site = Site.of(lm, 2)
    alone = read_keys(lm, FACTS[:1], 1, site, [""], "bare").keys
    among = read_keys(lm, FACTS[:8], 1, site, [""], "bare").keys
    keys = torch.cat([alone, among], 1)
    tolerance = duplicate_tolerance(rounding(torch.bfloat16, lm.device))
    constraints = Constraints(keys, keys[:3], torch.ones(keys.shape[1], dtype=torch.float64))
    distinct = len(Constraints(among, among[:3], torch.ones(8, dtype=torch.float64)).merged(tolerance))
    assert len(constraints.merged(tolerance)) == distinct
