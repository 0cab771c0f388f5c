"""Tests of the KV cache of prefixes, read in two parts, against one plain pass of each row."""

import pytest
import torch

from editlab.lm.forward import cache_of
from editlab.lm.language_model import LanguageModel
from editlab.lm.prefix_cache import PrefixCache, extend_prefix, read_prefixes
from tests.tiny import tiny_model, tiny_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_prefixes_are_the_same_as_if_each_were_run_alone(family):
    # Columns that share a beginning, share nothing, are the same in all rows, and are empty in some.
    table = [[(5, 6, 7, 8), (9, 3), (4, 4), ()], [(5, 6, 2), (11, 3, 2, 2), (4, 4), (3,)]]
    lm = LanguageModel(tiny_model(family), tiny_tokenizer())
    cache = read_prefixes(lm, table)
    flat = [prefix for row in table for prefix in row]
    assert cache.mask.sum(1).tolist() == [len(prefix) for prefix in flat]
    for number, prefix in enumerate(flat):
        if not prefix:
            continue
        alone = lm.run(torch.tensor([prefix]), use_cache=True).past_key_values
        real = cache.mask[number].bool()
        for (keys, values), layer in zip(cache.layers, alone.layers, strict=True):
            assert torch.allclose(keys[number, :, real], layer.keys[0], atol=1e-5)
            assert torch.allclose(values[number, :, real], layer.values[0], atol=1e-5)


def test_empty_prefixes_run_no_pass():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    lm.run = None  # must not be called
    cache = extend_prefix(lm, [(), ()], PrefixCache.empty(2))
    assert cache.layers == []
    assert cache.mask.shape == (2, 0)


def test_a_cache_with_freed_blocks_keeps_its_length():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    cache = extend_prefix(lm, [(4, 5, 6), (7,)], PrefixCache.empty(2))
    kept = cache.layers[1][0].clone()
    cache.free_blocks(1)
    whole = cache_of(cache.layers)
    assert whole.get_seq_length(0) == whole.get_seq_length(1) == 3
    # The first feature of one token represents all of them.
    assert cache.layers[0][0].shape[-1] == 1
    assert cache.layers[0][0].stride(0) == 0
    assert torch.equal(cache.layers[1][0], kept)
