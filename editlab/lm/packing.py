"""Layouts of rows of different lengths in a forward pass: padded to one length, or packed one after the other.

In a packed layout the linear maps compute no padding; only attention separates the rows, by an attention function that
editlab registers with transformers. If the rows have no KV cache before them, their common beginnings are computed only
once. Each model is tested on a few short rows: if packed rows do not give the results of padded rows (for example
because the model has its own attention code), its rows are padded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from editlab.lm.forward import cache_of, with_cache
from editlab.lm.precision import rounding
from editlab.lm.prefix_cache import PrefixCache, read_prefixes
from editlab.lm.quantized import is_quantized
from editlab.lm.runner import ModelRunner
from editlab.lm.tokens import by_length, pad
from editlab.utils.compat import attention_of, attention_set

PACKED = "editlab_packed"
"""Name under which editlab's attention function is registered with transformers."""

PART = 1024
"""Padded tokens in one attention call on a CPU, few enough that the rows of a call have similar lengths.
On other devices it is sixteen times as many, because a call costs more than some padding."""


class Rows(Protocol):
    """Rows of token ids in one tensor, whose hidden states are [rows of the tensor, columns, features]."""

    rows: int
    """number of rows of the tensor"""

    def locate(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column in the tensor of the tokens at ``columns`` of the rows of ids ``rows``."""

    def run(self) -> Any:
        """Run the model's forward on the rows, and return its output."""


class Layout(Rows, Protocol):
    """Rows of token ids, each with the KV cache of its prefix, of which some can be dropped."""

    prefix: PrefixCache

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Keep only the rows where ``rows`` (bool, on the CPU) is true, and return their hidden states.

        The host does not wait for the model's device.
        """


class Padded:
    """Layout with rows padded on the right."""

    def __init__(self, lm: ModelRunner, tails: Sequence[Sequence[int]], prefix: PrefixCache) -> None:
        ids, mask = pad(tails)
        self.lm, self.prefix = lm, prefix
        self.ids, self.mask = ids.to(lm.device), torch.cat([prefix.mask, mask], 1).to(lm.device)
        columns = torch.arange(ids.shape[1], device="cpu")
        self.positions = (prefix.mask.sum(1, keepdim=True) + columns).to(lm.device)
        self.rows = len(ids)

    def locate(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return rows, columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        kept = rows.nonzero()[:, 0]
        there = kept.to(self.ids.device, non_blocking=True)
        self.ids, self.mask, self.positions = self.ids[there], self.mask[there], self.positions[there]
        self.prefix, self.rows = self.prefix.rows(kept), len(kept)
        return hidden[there.to(hidden.device)]

    def run(self) -> Any:
        """See :class:`Rows`."""
        if not self.prefix.layers:
            return self.lm.run(self.ids, self.mask, self.positions)
        cache = cache_of(self.prefix.layers)
        return self.lm.run(self.ids, self.mask, self.positions, **with_cache(self.lm.model, cache))


class InOneRow(ABC):
    """Base class of layouts with all tokens in one row of the tensor, so that attention must separate the rows."""

    rows = 1
    lm: ModelRunner
    ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens]"""

    def run(self) -> Any:
        """See :class:`Rows`."""
        with _attending(self.lm, self):
            return self.lm.run(self.ids[None], None, self.positions[None])

    @abstractmethod
    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Compute the attention of every row to its prefix and to itself.

        Args:
            module: the model's attention module.
            query: [1, heads, tokens, features].
            key: [1, key heads, tokens, features]; each key head belongs to a group of query heads.
            value: same shape as the key.
            scaling: factor of the products; None means one over the square root of the features.
            window: number of tokens that a token attends to; None if the layer has no sliding window.

        Returns:
            [1, tokens, heads, features].
        """


class Packed(InOneRow):
    """Layout with rows one after the other, without padding."""

    def __init__(self, lm: ModelRunner, tails: Sequence[Sequence[int]], prefix: PrefixCache) -> None:
        self.lm, self.prefix = lm, prefix
        self.ids = torch.tensor([token for tail in tails for token in tail], device=lm.device)
        self._lay_out(torch.tensor([len(tail) for tail in tails], device="cpu"))

    def _lay_out(self, lengths: Tensor) -> None:
        """Compute all indices on the CPU and copy them to the device, so that the host does not wait for shapes."""
        starts = lengths.cumsum(0) - lengths
        numbers = torch.arange(int(lengths.sum()), device="cpu")
        row = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        column = numbers - starts[row]
        columns = torch.arange(int(lengths.max()), device="cpu")
        # Padding is a copy of a row's first token; the causal mask hides it from all tokens of the row.
        unpacking = starts[:, None] + torch.where(columns < lengths[:, None], columns, 0)
        before = self.prefix.mask
        own = (before.sum(1, keepdim=True) + columns).expand(len(lengths), -1)
        seen = (columns[None, :] <= columns[:, None]).expand(len(lengths), -1, -1)
        seen = torch.cat([before.bool()[:, None].expand(-1, len(columns), -1), seen], 2)[:, None]
        at = torch.cat([before.cumsum(1) - 1, own], 1)
        self.lengths, self.row = lengths, row
        self.starts, self.unpacking, self.packing, self.positions, self.at, self.seen = (
            tensor.to(self.lm.device, non_blocking=True)
            for tensor in (starts, unpacking, row * len(columns) + column, own[row, column], at, seen)
        )

    def locate(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return torch.zeros_like(rows), self.starts[rows] + columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        tokens = rows[self.row].nonzero()[:, 0].to(self.ids.device, non_blocking=True)
        self.ids, self.prefix = self.ids[tokens], self.prefix.rows(rows.nonzero()[:, 0])
        self._lay_out(self.lengths[rows])
        return hidden[:, tokens.to(hidden.device)]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See :meth:`InOneRow.attend`."""
        query, key, value = (_unpacked(t, self.unpacking) for t in (query, key, value))
        if self.prefix.layers:
            past_key, past_value = self.prefix.layers[module.layer_idx]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        seen = self.seen.to(query.device)
        if window is not None and key.shape[2] > window:
            at = self.at.to(query.device)
            seen = seen & (at[:, None, -query.shape[2] :, None] - at[:, None, None, :] < window)
        return _attention_of_rows(query, key, value, seen, scaling).index_select(0, self.packing.to(query.device))[None]


def _unpacked(states: Tensor, indices: Tensor) -> Tensor:
    """Select tokens ``indices`` [rows, columns] of [1, heads, tokens, features]: [rows, heads, columns, features]."""
    # With tokens first, whole rows are copied; the gradient is then a sum over rows, without sorting the indices.
    flat = states[0].transpose(0, 1).index_select(0, indices.flatten().to(states.device))
    return flat.unflatten(0, indices.shape).transpose(1, 2)


def _attention_of_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float | None) -> Tensor:
    """Return attention [rows * columns, heads, features] with the mask ``seen``, or causal attention if it is None."""
    on_cpu, grouped = query.device.type == "cpu", query.shape[1] != key.shape[1]
    if grouped and not on_cpu:
        # On other devices, kernels with a mask need one key head for each query head.
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    causal = seen is None
    out = scaled_dot_product_attention(
        query, key, value, seen, is_causal=causal, scale=scaling, enable_gqa=grouped and on_cpu
    )
    return out.transpose(1, 2).flatten(0, 1)


class Merged(InOneRow):
    """Layout of rows without a prefix, in which common beginnings of rows are stored and computed once."""

    def __init__(self, lm: ModelRunner, rows: Sequence[Sequence[int]]) -> None:
        self.lm = lm
        paths, steps = _paths(rows)
        depth = [0] * len(steps)
        spread: list[int] = [0] * len(steps)  # index of each token's attention in the concatenated parts
        parts, done = [], 0
        for group in by_length([len(path) for path in paths], PART if lm.device.type == "cpu" else 16 * PART):
            width = len(paths[group[0]])
            # Padding is a copy of a row's first token, as in Packed.
            parts.append([paths[r] + paths[r][:1] * (width - len(paths[r])) for r in group])
            for j, r in enumerate(group):
                for column, number in enumerate(paths[r]):
                    depth[number], spread[number] = column, done + j * width + column
            done += len(group) * width
        widest = max(map(len, paths))
        table = [path + path[:1] * (widest - len(path)) for path in paths]
        self.ids, self.positions, self.packing, self.table, *self.parts = (
            torch.tensor(numbers, device=lm.device) for numbers in ([t for _, t in steps], depth, spread, table, *parts)
        )

    def locate(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return torch.zeros_like(rows), self.table[rows, columns]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See :meth:`InOneRow.attend`; rows of similar length are computed together."""
        found = []
        for part in self.parts:
            at = torch.arange(part.shape[1], device=query.device)
            back = at[:, None] - at[None, :]
            # A mask is made only if it is needed, because kernels without a mask are faster.
            seen = (back >= 0) & (back < window) if window is not None and len(at) > window else None
            q, k, v = (_unpacked(t, part) for t in (query, key, value))
            found.append(_attention_of_rows(q, k, v, seen, scaling))
        return torch.cat(found).index_select(0, self.packing.to(query.device))[None]


def _paths(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the rows as paths in a tree of tokens: node numbers of each row, and (parent or -1, id) of each node."""
    numbers: dict[tuple[int, int], int] = {}
    paths = []
    for row in rows:
        path: list[int] = []
        for token in row:
            path.append(numbers.setdefault((path[-1] if path else -1, token), len(numbers)))
        paths.append(path)
    return paths, list(numbers)


_attending_now: list[InOneRow] = []


@contextmanager
def _attending(lm: ModelRunner, layout: InOneRow) -> Iterator[None]:
    """Make the model use the attention of ``layout`` inside the ``with``."""
    configs = {id(c): c for m in lm.anatomy.blocks.modules() if (c := getattr(m, "config", None)) is not None}
    configs[id(lm.model.config)] = lm.model.config
    _attending_now.append(layout)
    try:
        with attention_set(list(configs.values()), PACKED):
            yield
    finally:
        _attending_now.pop()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, position_bias: Tensor | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if position_bias is not None:
        raise NotImplementedError("attention with a position bias")
    return _attending_now[-1].attend(module, query, key, value, scaling, sliding_window), None


# No mask function is registered, so transformers makes no mask. To make one it would read the positions, and the host
# would wait for the device at each pass.
AttentionInterface.register(PACKED, _attention)


def lay_out(lm: ModelRunner, tails: Sequence[Sequence[int]], prefix: PrefixCache) -> Layout:
    """Return a packed layout if the model supports it, else a padded one."""
    return (Packed if lm.packs else Padded)(lm, tails, prefix)


def lay_out_whole(lm: ModelRunner, rows: Sequence[Sequence[int]]) -> Rows:
    """Return a layout of rows without a prefix: merged if the model supports packed rows, else padded."""
    return Merged(lm, rows) if lm.packs else Padded(lm, rows, PrefixCache.empty(len(rows)))


@torch.no_grad()
def pads_between(lm: ModelRunner) -> bool:
    """Return whether padding in the middle of a row leaves its logits unchanged, tested on a short row.

    It does not in models that bias attention by the distance of two tokens, counting padding (MPT).
    """
    prefix = read_prefixes(
        lm, [[(1, 2, 3)], [(1, 2, 3, 4, 5, 6)]]
    )  # the common beginning runs once, the rest is padded
    padded = Padded(lm, [(7, 8), (7, 8)], prefix).run().logits[0]
    whole = lm.run(torch.tensor([[1, 2, 3, 7, 8]])).logits[0, 3:]
    return bool((padded - whole).abs().max() <= _tolerance(lm) * whole.abs().max())


def _tolerance(lm: ModelRunner) -> float:
    """Return the relative rounding error of the largest logit, in the model's data type and on its device."""
    if is_quantized(lm.model):
        return 0.1  # in 8 bits, bitsandbytes rounds a row's inputs by what the other rows of the pass contain
    return max(1e-4, 4 * rounding(lm.model.dtype, lm.device))


@torch.no_grad()
def can_pack(lm: ModelRunner) -> bool:
    """Return whether packed rows give the logits of padded rows, tested on three short rows."""
    if attention_of(lm.model.config) != "sdpa":
        return False  # other attention (soft caps) may differ in ways that short rows do not show
    prefix = read_prefixes(lm, [[(1, 2)], [(3,)], [(1, 2)]])
    tails = [(4, 5, 6), (7,), (8, 9)]
    indices = torch.tensor([(r, c) for r, tail in enumerate(tails) for c in range(len(tail))], device=lm.device).T
    try:
        packed, padded = (
            layout.run().logits[layout.locate(*indices)]
            for layout in (Packed(lm, tails, prefix), Padded(lm, tails, prefix))
        )
    except Exception:  # a model's own code may raise any error for packed rows
        return False
    return bool((packed - padded).abs().max() <= _tolerance(lm) * padded.abs().max())
