"""How rows of different lengths go through a model: padded to one length, or packed one after the other.

Packed, the linear maps see no padding; only attention takes the rows apart, through an attention function of ours that
transformers calls. Where nothing stands before the rows, tokens that rows begin with in common run once for all of
them. A model for which that does not give what padded rows give (its attention is its own code, say) is found out by
trying, and its rows are padded.
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

from editlab.lm.forward import cache_of
from editlab.lm.precision import rounding
from editlab.lm.prefix_cache import Past, read_prefixes
from editlab.lm.runner import ModelRunner
from editlab.lm.tokens import by_length, pad
from editlab.utils.compat import attention_of, attention_set

PACKED = "editlab_packed"
"""Name of our attention function among transformers'."""

PART = 1024
"""Padded tokens of the rows whose attention is computed at a time on a CPU: few enough for rows of similar length.
Elsewhere, where a call costs more than some padding, sixteen times as many."""


class Rows(Protocol):
    """Rows of token ids; hidden states of them are [rows of the tensor, columns, features]."""

    rows: int
    """rows of the tensor"""

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens lie in the tensor: row and column of each."""

    def run(self) -> Any:
        """The model's own forward on the rows as they are."""


class Layout(Rows, Protocol):
    """Rows of token ids, each with its past, that may leave."""

    past: Past

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Drop rows, and return the hidden states of those that are kept; ``rows`` is bool, on the CPU.

        The host does not wait for the model's device in it.
        """


class Padded:
    """Rows padded on the right."""

    def __init__(self, lm: ModelRunner, tails: Sequence[Sequence[int]], past: Past) -> None:
        ids, mask = pad(tails)
        self.lm, self.past = lm, past
        self.ids, self.mask = ids.to(lm.device), torch.cat([past.mask, mask], 1).to(lm.device)
        columns = torch.arange(ids.shape[1], device="cpu")
        self.positions = (past.mask.sum(1, keepdim=True) + columns).to(lm.device)
        self.rows = len(ids)

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return rows, columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        kept = rows.nonzero()[:, 0]
        there = kept.to(self.ids.device, non_blocking=True)
        self.ids, self.mask, self.positions = self.ids[there], self.mask[there], self.positions[there]
        self.past, self.rows = self.past.rows(kept), len(kept)
        return hidden[there.to(hidden.device)]

    def run(self) -> Any:
        """See :class:`Rows`."""
        if not self.past.layers:
            return self.lm.run(self.ids, self.mask, self.positions)
        return self.lm.run(
            self.ids, self.mask, self.positions, past_key_values=cache_of(self.past.layers), use_cache=True
        )


class InOneRow(ABC):
    """Rows whose tokens lie in one row of the tensor, so that attention has to take them apart."""

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
        """Attention of every row to its past and to itself.

        Args:
            module: the model's attention module.
            query: [1, heads, tokens, features].
            key: [1, key heads, tokens, features]; each of its heads serves a group of the query's.
            value: like the key.
            scaling: of the products; by the root of the features where None.
            window: tokens that a token sees, where the layer has a sliding window.

        Returns:
            [1, tokens, heads, features].
        """


class Packed(InOneRow):
    """Rows one after the other."""

    def __init__(self, lm: ModelRunner, tails: Sequence[Sequence[int]], past: Past) -> None:
        self.lm, self.past = lm, past
        self.ids = torch.tensor([token for tail in tails for token in tail], device=lm.device)
        self._lay_out(torch.tensor([len(tail) for tail in tails], device="cpu"))

    def _lay_out(self, lengths: Tensor) -> None:
        """Compute all indices on the CPU and send them to the device, where the host would wait for their shapes."""
        starts = lengths.cumsum(0) - lengths
        numbers = torch.arange(int(lengths.sum()), device="cpu")
        row = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        column = numbers - starts[row]
        columns = torch.arange(int(lengths.max()), device="cpu")
        # Padding is a copy of a row's first token, which no token of the row can see in its place.
        unpacking = starts[:, None] + torch.where(columns < lengths[:, None], columns, 0)
        before = self.past.mask
        own = (before.sum(1, keepdim=True) + columns).expand(len(lengths), -1)
        seen = (columns[None, :] <= columns[:, None]).expand(len(lengths), -1, -1)
        seen = torch.cat([before.bool()[:, None].expand(-1, len(columns), -1), seen], 2)[:, None]
        at = torch.cat([before.cumsum(1) - 1, own], 1)
        self.lengths, self.row = lengths, row
        self.starts, self.unpacking, self.packing, self.positions, self.at, self.seen = (
            tensor.to(self.lm.device, non_blocking=True)
            for tensor in (starts, unpacking, row * len(columns) + column, own[row, column], at, seen)
        )

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return torch.zeros_like(rows), self.starts[rows] + columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        tokens = rows[self.row].nonzero()[:, 0].to(self.ids.device, non_blocking=True)
        self.ids, self.past = self.ids[tokens], self.past.rows(rows.nonzero()[:, 0])
        self._lay_out(self.lengths[rows])
        return hidden[:, tokens.to(hidden.device)]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See :meth:`InOneRow.attend`."""
        query, key, value = (_taken_apart(t, self.unpacking) for t in (query, key, value))
        if self.past.layers:
            past_key, past_value = self.past.layers[module.layer_idx]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        seen = self.seen.to(query.device)
        if window is not None and key.shape[2] > window:
            at = self.at.to(query.device)
            seen = seen & (at[:, None, -query.shape[2] :, None] - at[:, None, None, :] < window)
        return _attention_of_rows(query, key, value, seen, scaling).index_select(0, self.packing.to(query.device))[None]


def _taken_apart(states: Tensor, places: Tensor) -> Tensor:
    """Of [1, heads, tokens, features] those at ``places`` [rows, columns]: [rows, heads, columns, features]."""
    # Rows of memory are moved as they are (heads last), whose gradients are sums over rows: no sorting of indices.
    flat = states[0].transpose(0, 1).index_select(0, places.flatten().to(states.device))
    return flat.unflatten(0, places.shape).transpose(1, 2)


def _attention_of_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float | None) -> Tensor:
    """Attention [rows * columns, heads, features], where ``seen`` says so, or to all on the left where it is None."""
    on_cpu, grouped = query.device.type == "cpu", query.shape[1] != key.shape[1]
    if grouped and not on_cpu:
        # Elsewhere the kernels that take a mask want a key head for each query head.
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    causal = seen is None
    out = scaled_dot_product_attention(
        query, key, value, seen, is_causal=causal, scale=scaling, enable_gqa=grouped and on_cpu
    )
    return out.transpose(1, 2).flatten(0, 1)


class Merged(InOneRow):
    """Rows with nothing before them; what several begin with in common is there once."""

    def __init__(self, lm: ModelRunner, rows: Sequence[Sequence[int]]) -> None:
        self.lm = lm
        paths, steps = _paths(rows)
        depth = [0] * len(steps)
        spread: list[int] = [0] * len(steps)  # where each token's attention lies among that of all parts
        parts, done = [], 0
        for group in by_length([len(path) for path in paths], PART if lm.device.type == "cpu" else 16 * PART):
            width = len(paths[group[0]])
            # As in packed rows, padding is a copy of a row's first token.
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

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        return torch.zeros_like(rows), self.table[rows, columns]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See :meth:`InOneRow.attend`; rows of similar length go together."""
        found = []
        for part in self.parts:
            at = torch.arange(part.shape[1], device=query.device)
            back = at[:, None] - at[None, :]
            # Without a mask where none is needed, for which there are faster kernels.
            seen = (back >= 0) & (back < window) if window is not None and len(at) > window else None
            q, k, v = (_taken_apart(t, part) for t in (query, key, value))
            found.append(_attention_of_rows(q, k, v, seen, scaling))
        return torch.cat(found).index_select(0, self.packing.to(query.device))[None]


def _paths(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The tree of the rows: each row as numbers of tokens, and of each number the one before it (or -1) and the id."""
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
    """The model's attention is ``layout``'s inside the ``with``."""
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
    scaling: float | None = None, sliding_window: int | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if position_bias is not None:
        raise NotImplementedError("attention with a bias of its own")
    return _attending_now[-1].attend(module, query, key, value, scaling, sliding_window), None


# Without a function for its masks transformers makes none; with one it would first look at the positions, for which the
# host would wait at each pass.
AttentionInterface.register(PACKED, _attention)


def lay_out(lm: ModelRunner, tails: Sequence[Sequence[int]], past: Past) -> Layout:
    """Rows packed where the model runs them so, else padded."""
    return (Packed if lm.packs else Padded)(lm, tails, past)


def lay_out_whole(lm: ModelRunner, rows: Sequence[Sequence[int]]) -> Rows:
    """Rows with nothing before them, merged where the model runs packed rows, else padded."""
    return Merged(lm, rows) if lm.packs else Padded(lm, rows, Past.none(len(rows)))


@torch.no_grad()
def pads_between(lm: ModelRunner) -> bool:
    """Whether a row says the same with padding in its middle, tried on a short one.

    Models that bias attention by the distance of two places in a row, padding counted (MPT), do not.
    """
    past = read_prefixes(lm, [[(1, 2, 3)], [(1, 2, 3, 4, 5, 6)]])  # what both begin with runs once, the rest is padded
    padded = Padded(lm, [(7, 8), (7, 8)], past).run().logits[0]
    whole = lm.run(torch.tensor([[1, 2, 3, 7, 8]])).logits[0, 3:]
    return bool((padded - whole).abs().max() <= _tolerance(lm) * whole.abs().max())


def _tolerance(lm: ModelRunner) -> float:
    """Relative error of the largest logit that rounding makes, in the model's type and on its device."""
    return max(1e-4, 4 * rounding(lm.model.dtype, lm.device))


@torch.no_grad()
def can_pack(lm: ModelRunner) -> bool:
    """Whether packed rows give what padded rows give, tried on three short ones."""
    if attention_of(lm.model.config) != "sdpa":
        return False  # its attention does more than the usual (soft caps), which short rows may not show
    past = read_prefixes(lm, [[(1, 2)], [(3,)], [(1, 2)]])
    tails = [(4, 5, 6), (7,), (8, 9)]
    places = torch.tensor([(r, c) for r, tail in enumerate(tails) for c in range(len(tail))], device=lm.device).T
    try:
        packed, padded = (
            layout.run().logits[layout.place(*places)] for layout in (Packed(lm, tails, past), Padded(lm, tails, past))
        )
    except Exception:  # whatever a model's own code thinks of rows that it was not written for
        return False
    return bool((packed - padded).abs().max() <= _tolerance(lm) * padded.abs().max())
