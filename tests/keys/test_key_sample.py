"""Keys read at several layers at once are those that the solve reads at each of them."""

import pytest
import torch

import editlab.keys.key_sample as module
from editlab.keys.key_sample import read_key_sample
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.language_model import LanguageModel
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_keys_are_those_of_the_solve(bos, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(bos=bos))
    found = read_key_sample(lm, FACTS[:6], [1, 3])
    for layer, sample in found.items():
        keys = read_keys(lm, FACTS[:6], layer, Site.of(lm, layer), [""], "bare")
        assert torch.allclose(sample.keys, keys.keys, atol=1e-6)
        assert torch.allclose(sample.context_keys, keys.context_keys, atol=1e-6)
        assert torch.equal(sample.context_fact, keys.context_fact)
