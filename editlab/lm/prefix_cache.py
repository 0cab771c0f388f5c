"""Keys and values of tokens that stand before others, so that a model goes on from them and does not run them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.lm.forward import KeyValues, cache_of, logits_only_at, past_of
from editlab.lm.runner import ModelRunner
from editlab.lm.tokens import common_start, pad


@dataclass
class Past:
    """What some rows have before them, padded on the left."""

    layers: KeyValues
    """keys and values of each block, [rows, heads, tokens, features]; empty where no row has anything"""
    mask: Tensor
    """long [rows, tokens] on the CPU: 0 where a row is padded"""

    @classmethod
    def none(cls, rows: int) -> Past:
        """Rows with nothing before them."""
        return cls([], torch.zeros(rows, 0, dtype=torch.long, device="cpu"))

    def rows(self, which: Tensor) -> Past:
        """Those of some rows: their indices on the CPU, of which one may come again."""
        devices = {tensor.device for pair in self.layers for tensor in pair}
        there = {device: which.to(device, non_blocking=True) for device in devices}
        layers = [(k[there[k.device]], v[there[v.device]]) for k, v in self.layers]
        return Past(layers, self.mask[which])

    def forget(self, blocks: int) -> None:
        """Drops what the first blocks hold, for passes that step over them; its length is still told."""
        for i, (key, value) in enumerate(self.layers[:blocks]):
            key, value = (t[:1, :, :, :1].expand(len(t), -1, -1, -1) for t in (key, value))
            self.layers[i] = (key, value)


@torch.no_grad()
def read_past(lm: ModelRunner, rows: Sequence[Sequence[int]], past: Past) -> Past:
    """What rows of token ids, each going on from its ``past``, leave to those that follow."""
    ids, mask = pad(rows, left=True)
    if ids.shape[1] == 0:
        return past
    whole = torch.cat([past.mask, mask], 1)
    # A row without any token is all padding, which nothing reads; attending to it keeps its content finite.
    seen = torch.where(whole.any(1, keepdim=True), whole, 1)
    positions = (seen.cumsum(1) - 1).clamp_min(0)[:, past.mask.shape[1] :]
    cache = cache_of(past.layers)
    zero = torch.zeros(1, dtype=torch.long, device=lm.device)
    with logits_only_at(lm.anatomy.head, zero, zero):
        lm.run(ids, seen, positions, past_key_values=cache, use_cache=True)
    return Past(past_of(cache), whole)


def read_prefixes(lm: ModelRunner, prefixes: Sequence[Sequence[tuple[int, ...]]]) -> Past:
    """The past of one prefix a row; what prefixes of one column have in common runs once.

    Args:
        lm: the model.
        prefixes: token ids, rows of a table: a fact's prefixes, one a context. Facts share the contexts.

    Returns:
        The past of each prefix, row by row of the table.
    """
    shared = [common_start(column) for column in zip(*prefixes, strict=True)]
    starts = list(dict.fromkeys(shared))
    cut = [(starts.index(s), p[len(s) :]) for row in prefixes for s, p in zip(shared, row, strict=True)]
    different = list(dict.fromkeys(cut))
    before = read_past(lm, starts, Past.none(len(starts))).rows(
        torch.tensor([start for start, _ in different], device="cpu")
    )
    whole = read_past(lm, [rest for _, rest in different], before)
    return whole.rows(torch.tensor([different.index(one) for one in cut], device="cpu"))
