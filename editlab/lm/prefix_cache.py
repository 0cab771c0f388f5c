"""KV caches of common prefixes, so that a model runs each prefix only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.lm.forward import KeyValues, cache_of, key_values_of, logits_only_at, with_cache
from editlab.lm.runner import ModelRunner
from editlab.lm.tokens import common_start, pad


@dataclass
class PrefixCache:
    """KV cache of the prefixes of some rows, padded on the left."""

    layers: KeyValues
    """keys and values of each block, [rows, heads, tokens, features]; empty if no row has a prefix"""
    mask: Tensor
    """attention mask, long [rows, tokens] on the CPU: 0 at padding"""

    @classmethod
    def empty(cls, rows: int) -> PrefixCache:
        """Return the cache of ``rows`` rows without a prefix."""
        return cls([], torch.zeros(rows, 0, dtype=torch.long, device="cpu"))

    def rows(self, which: Tensor) -> PrefixCache:
        """Return the cache of the rows with indices ``which``, long on the CPU; repeats are allowed."""
        devices = {tensor.device for pair in self.layers for tensor in pair}
        there = {device: which.to(device, non_blocking=True) for device in devices}
        layers = [(k[there[k.device]], v[there[v.device]]) for k, v in self.layers]
        return PrefixCache(layers, self.mask[which])

    def free_blocks(self, blocks: int) -> None:
        """Free the memory of the first ``blocks`` blocks, for passes that skip them; the length stays the same."""
        for i, (key, value) in enumerate(self.layers[:blocks]):
            key, value = (t[:1, :, :, :1].expand(len(t), -1, -1, -1) for t in (key, value))
            self.layers[i] = (key, value)


@torch.no_grad()
def extend_prefix(lm: ModelRunner, rows: Sequence[Sequence[int]], prefix: PrefixCache) -> PrefixCache:
    """Run rows of token ids, each after its ``prefix``, and return the KV cache of prefix and row."""
    ids, mask = pad(rows, left=True)
    if ids.shape[1] == 0:
        return prefix
    whole = torch.cat([prefix.mask, mask], 1)
    # A row without tokens consists of padding that no token attends to; attending to itself keeps it finite.
    seen = torch.where(whole.any(1, keepdim=True), whole, 1)
    positions = (seen.cumsum(1) - 1).clamp_min(0)[:, prefix.mask.shape[1] :]
    cache = cache_of(prefix.layers)
    zero = torch.zeros(1, dtype=torch.long, device=lm.device)
    with logits_only_at(lm.anatomy.head, zero, zero):
        lm.run(ids, seen, positions, **with_cache(lm.model, cache))
    return PrefixCache(key_values_of(cache), whole)


def read_prefixes(lm: ModelRunner, prefixes: Sequence[Sequence[tuple[int, ...]]]) -> PrefixCache:
    """Return the KV cache of each prefix in a table; the common beginning of a column's prefixes runs once.

    Args:
        lm: the model.
        prefixes: table of token ids with one row for each fact and one column for each context; the prefixes of a
            column begin with the same context.

    Returns:
        The cache of all prefixes, in row-major order of the table.
    """
    shared = [common_start(column) for column in zip(*prefixes, strict=True)]
    starts = list(dict.fromkeys(shared))
    cut = [(starts.index(s), p[len(s) :]) for row in prefixes for s, p in zip(shared, row, strict=True)]
    different = list(dict.fromkeys(cut))
    before = extend_prefix(lm, starts, PrefixCache.empty(len(starts))).rows(
        torch.tensor([start for start, _ in different], device="cpu")
    )
    whole = extend_prefix(lm, [rest for _, rest in different], before)
    return whole.rows(torch.tensor([different.index(one) for one in cut], device="cpu"))
