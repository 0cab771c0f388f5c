"""What stands before rows, read in two parts, against one plain pass of each row."""

import pytest
import torch

from editlab.lm.forward import cache_of
from editlab.lm.language_model import LanguageModel
from editlab.lm.prefix_cache import Past, read_past, read_prefixes
from tests.tiny import tiny_model, tiny_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_prefixes_are_as_if_each_had_run_alone(family):
    # Columns that share a beginning, share nothing, are the same in all rows, and are empty in some.
    table = [[(5, 6, 7, 8), (9, 3), (4, 4), ()], [(5, 6, 2), (11, 3, 2, 2), (4, 4), (3,)]]
    lm = LanguageModel(tiny_model(family), tiny_tokenizer())
    past = read_prefixes(lm, table)
    flat = [prefix for row in table for prefix in row]
    assert past.mask.sum(1).tolist() == [len(prefix) for prefix in flat]
    for number, prefix in enumerate(flat):
        if not prefix:
            continue
        alone = lm.run(torch.tensor([prefix]), use_cache=True).past_key_values
        real = past.mask[number].bool()
        for (keys, values), layer in zip(past.layers, alone.layers, strict=True):
            assert torch.allclose(keys[number, :, real], layer.keys[0], atol=1e-5)
            assert torch.allclose(values[number, :, real], layer.values[0], atol=1e-5)


def test_nothing_before_is_nothing_to_run():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    lm.run = None  # must not be called
    past = read_past(lm, [(), ()], Past.none(2))
    assert past.layers == []
    assert past.mask.shape == (2, 0)


def test_a_past_that_is_forgotten_keeps_its_length():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    past = read_past(lm, [(4, 5, 6), (7,)], Past.none(2))
    kept = past.layers[1][0].clone()
    past.forget(1)
    cache = cache_of(past.layers)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 3
    # One row's first feature stands for all.
    assert past.layers[0][0].shape[-1] == 1
    assert past.layers[0][0].stride(0) == 0
    assert torch.equal(past.layers[1][0], kept)
