"""Rows of tokens that a training learns from, and the model's logits at them, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.lm.forward import logits_only_at
from editlab.lm.language_model import LanguageModel
from editlab.lm.packing import lay_out
from editlab.lm.prefix_cache import PrefixCache


class Row(NamedTuple):
    """Token ids, and the positions whose next-token predictions count."""

    ids: tuple[int, ...]
    indices: tuple[int, ...]
    """the positions"""
    following: tuple[int, ...]
    """the token after each position"""


def edit_rows(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str], end: int | None = None) -> list[Row]:
    """Each fact's question in each context, up to the last token of its new target; the target's tokens count.

    Args:
        lm: the model.
        facts: the facts.
        contexts: prefixes of the questions.
        end: id of a token that follows the target and counts too; default: none.
    """
    rows = []
    for fact in facts:
        for context in contexts:
            encoding, start = lm.encode_pair(lm.in_context(context, fact.question), fact.target_new)
            ids = (*encoding.ids, *([] if end is None else [end]))
            rows.append(Row(ids[:-1], tuple(range(start - 1, len(ids) - 1)), ids[start:]))
    return rows


def logits_of(lm: LanguageModel, rows: Sequence[Row]) -> Tensor:
    """Float32 logits at the rows' positions, one row after the other, [positions, vocabulary], with gradients.

    Rows are packed if the model supports it.
    """
    layout = lay_out(lm, [row.ids for row in rows], PrefixCache.empty(len(rows)))
    index = torch.tensor([(r, i) for r, row in enumerate(rows) for i in row.indices], device=lm.device)
    with logits_only_at(lm.anatomy.head, *layout.locate(index[:, 0], index[:, 1])):
        logits: Tensor = layout.run().logits[0].float()
    return logits
