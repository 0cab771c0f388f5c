"""NAS's anchor against a direct transcription in float64, and the layer's parts against the model's own layers."""

import pytest
import torch

from editlab.keys.subject_keys import Site, locate
from editlab.lm.forward import reading
from editlab.lm.language_model import LanguageModel
from editlab.values.anchor import anchor_of, anchored, parts_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.values.test_optimize import FACTS


def test_the_largest_norms_do_not_count():
    # 40 norms 1 .. 40: 5% are the two largest, so the mean is (1 + ... + 38) / 38 = 19.5.
    assert anchor_of(torch.arange(1.0, 41)[torch.randperm(40), None]) == pytest.approx(19.5)
    assert anchor_of(torch.arange(1.0, 20)[:, None]) == pytest.approx(10.0)  # of 19 none is left out


def test_values_are_those_of_a_transcription():
    values, layer, site = torch.randn(3, 5, 4, dtype=torch.float64)
    parts = layer + values - site
    found = anchored(values, parts, 2.5)
    for i in range(5):
        # The authors' code: the rest of the stream plus the layer's value, which is scaled to the mean norm.
        w = layer[i] + (values[i] - site[i])
        assert torch.allclose(found[i], (site[i] - layer[i]) + w * (2.5 / w.norm()), rtol=1e-12)
    assert torch.equal(anchored(values[:1], torch.zeros(1, 4), 2.5), values[:1])


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2"])
def test_parts_are_the_layer_s_output_plus_the_change(family):
    lm = LanguageModel(tiny_model(family), tiny_tokenizer())
    site = Site.of(lm, 1)
    values = torch.randn(len(FACTS), 32)
    found = parts_of(lm, FACTS, site, values)
    for i, fact in enumerate(FACTS):
        encoding, last = locate(lm, fact)
        with reading({"layer": (lm.anatomy.edit_module(1), "output"), "site": (site.module, "output")}) as seen:
            lm.model(input_ids=torch.tensor([encoding.ids]))
        expected = values[i] + (seen["layer"] - seen["site"])[0, last]
        assert torch.allclose(found[i].float(), expected, atol=1e-5)
        assert site.in_stream or torch.allclose(found[i].float(), values[i], atol=1e-6)
