"""How rows of different lengths go through a model: padded to one length, or packed one after the other.

Packed, the linear maps see no padding; only attention takes the rows apart, through an attention function of ours that
transformers calls. A model for which that does not give what padded rows give (its attention is its own code, say) is
found out by trying, and its rows are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from editlab.lm.language_model import LanguageModel
from editlab.lm.past import Past, read_prefixes
from editlab.lm.running import cache_of
from editlab.lm.tokens import pad

PACKED = "editlab_packed"
"""Name of our attention function among transformers'."""


class Layout(Protocol):
    """Rows of token ids, each with its past; hidden states of them are [rows of the tensor, columns, features]."""

    rows: int
    """rows of the tensor"""
    past: Past

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens lie in the tensor: row and column of each."""

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Drops rows; ``rows`` is bool. Gives the hidden states of those that are left."""

    def run(self) -> Any:
        """The model's own forward on the rows as they are."""


class Padded:
    """Rows padded on the right."""

    def __init__(self, lm: LanguageModel, tails: Sequence[Sequence[int]], past: Past) -> None:
        ids, mask = pad(tails)
        self.lm, self.past = lm, past
        self.ids, self.mask = ids.to(lm.device), torch.cat([past.mask, mask], 1).to(lm.device)
        self.positions = (past.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1])).to(lm.device)
        self.rows = len(ids)

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return rows, columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.past, self.rows = self.past.rows(rows), len(self.ids)
        return hidden[rows]

    def run(self) -> Any:
        """See :class:`Layout`."""
        if not self.past.layers:
            return self.lm.run(self.ids, self.mask, self.positions)
        return self.lm.run(
            self.ids, self.mask, self.positions, past_key_values=cache_of(self.past.layers), use_cache=True
        )


class Packed:
    """Rows one after the other in one row of the tensor."""

    rows = 1

    def __init__(self, lm: LanguageModel, tails: Sequence[Sequence[int]], past: Past) -> None:
        self.lm, self.past = lm, past
        self.ids = torch.tensor([token for tail in tails for token in tail], device=lm.device)
        self._lay_out(torch.tensor([len(tail) for tail in tails], device=lm.device))

    def _lay_out(self, lengths: Tensor) -> None:
        device = self.lm.device
        self.lengths, self.starts = lengths, lengths.cumsum(0) - lengths
        numbers = torch.arange(int(lengths.sum()), device=device)
        self.row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        self.column = numbers - self.starts[self.row]
        columns = torch.arange(int(lengths.max()), device=device)
        # Padding is a copy of a row's first token, which no token of the row can see in its place.
        self.unpacking = self.starts[:, None] + torch.where(columns < lengths[:, None], columns, 0)
        self.packing = self.row * len(columns) + self.column
        before = self.past.mask.to(device)
        own = (before.sum(1, keepdim=True) + columns).expand(len(lengths), -1)
        self.positions = own[self.row, self.column]
        self.at = torch.cat([before.cumsum(1) - 1, own], 1)
        seen = (columns[None, :] <= columns[:, None]).expand(len(lengths), -1, -1)
        self.seen = torch.cat([before.bool()[:, None].expand(-1, len(columns), -1), seen], 2)[:, None]

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Layout`."""
        return torch.zeros_like(rows), self.starts[rows] + columns

    def keep(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """See :class:`Layout`."""
        tokens = rows[self.row]
        self.ids, self.past = self.ids[tokens], self.past.rows(rows)
        self._lay_out(self.lengths[rows])
        return hidden[:, tokens]

    def run(self) -> Any:
        """See :class:`Layout`."""
        with _attending(self.lm, self):
            return self.lm.run(self.ids[None], None, self.positions[None])

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
        device = query.device
        shape = self.unpacking.shape
        unpacking, packing = self.unpacking.flatten().to(device), self.packing.to(device)
        # Rows of memory are moved as they are (heads last), whose gradients are sums over rows: no sorting of indices.
        query, key, value = (
            t[0].transpose(0, 1).index_select(0, unpacking).unflatten(0, shape).transpose(1, 2)
            for t in (query, key, value)
        )
        if self.past.layers:
            past_key, past_value = self.past.layers[module.layer_idx]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        seen = self.seen.to(device)
        if window is not None and key.shape[2] > window:
            at = self.at.to(device)
            seen = seen & (at[:, None, -query.shape[2] :, None] - at[:, None, None, :] < window)
        grouped = query.shape[1] != key.shape[1]
        if grouped and device.type != "cpu":
            # Elsewhere the kernels that take a mask want a key head for each query head.
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        out = scaled_dot_product_attention(
            query, key, value, seen, scale=scaling, enable_gqa=grouped and device.type == "cpu"
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, packing)[None]


_attending_now: list[Packed] = []


@contextmanager
def _attending(lm: LanguageModel, layout: Packed) -> Iterator[None]:
    """The model's attention is ``layout``'s inside the ``with``."""
    configs = {id(c): c for m in lm.anatomy.blocks.modules() if (c := getattr(m, "config", None)) is not None}
    configs[id(lm.model.config)] = lm.model.config
    before = [(c, c._attn_implementation) for c in configs.values()]
    _attending_now.append(layout)
    try:
        for config, _ in before:
            config._attn_implementation = PACKED
        yield
    finally:
        _attending_now.pop()
        for config, name in before:
            config._attn_implementation = name


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if position_bias is not None:
        raise NotImplementedError("attention with a bias of its own")
    return _attending_now[-1].attend(module, query, key, value, scaling, sliding_window), None


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def lay_out(lm: LanguageModel, tails: Sequence[Sequence[int]], past: Past) -> Layout:
    """Rows packed where the model is known to run them so (:func:`find_out`), else padded."""
    return (Packed if lm.packs else Padded)(lm, tails, past)


def find_out(lm: LanguageModel) -> None:
    """Finds out whether the model can run packed rows, where that is not known yet."""
    if lm.packs is None:
        lm.packs = _can_pack(lm)


@torch.no_grad()
def _can_pack(lm: LanguageModel) -> bool:
    """Whether packed rows give what padded rows give, tried on three short ones."""
    if lm.model.config._attn_implementation != "sdpa":
        return False  # its attention does more than the usual (soft caps), which short rows may not show
    # What rounding makes of it in the model's type.
    tolerance = max(1e-4, 4 * torch.finfo(lm.model.dtype).eps)
    past = read_prefixes(lm, [[(1, 2)], [(3,)], [(1, 2)]])
    tails = [(4, 5, 6), (7,), (8, 9)]
    places = torch.tensor([(r, c) for r, tail in enumerate(tails) for c in range(len(tail))], device=lm.device).T
    try:
        packed, padded = (
            layout.run().logits[layout.place(*places)] for layout in (Packed(lm, tails, past), Padded(lm, tails, past))
        )
    except Exception:  # whatever a model's own code thinks of rows that it was not written for
        return False
    return bool((packed - padded).abs().max() <= tolerance * padded.abs().max())
