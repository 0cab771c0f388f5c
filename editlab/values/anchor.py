"""The norm anchor of NAS (arXiv:2602.02543): every value is rescaled to a norm of the original model.

In a long sequence of edits, solved values and edited weights grow by each other. NAS breaks the loop: the edited
layer's part w of a value is rescaled to the mean norm that such parts had on the original weights::

    w_i = m_i + (v_i - s_i)                m_i: the layer's output now, s_i: the site's output now, v_i: the value
    v_i' = v_i - w_i + a w_i / ||w_i||     a: mean of ||w|| over some facts on the original weights

Where the site is the layer itself (a norm follows the MLP), s = m and w = v. As in the authors' code, the largest 5% of
the norms do not count in the mean. That code also leaves out an edit whose ||w|| is over 2 a; here it is rescaled too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.keys.subject_keys import Site, locate
from editlab.lm.language_model import LanguageModel

TRIMMED = 0.05
"""Fraction of the largest norms that do not count in the anchor."""


def anchor_of(parts: Tensor) -> float:
    """The mean norm of the rows of ``parts`` [n, d_v], without the largest 5% (rounded down to a number of rows).

    >>> anchor_of(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))  # two rows: none is left out
    3.0
    """
    norms = parts.double().norm(dim=1).sort().values
    return float(norms[: len(norms) - int(TRIMMED * len(norms))].mean())


def anchored(values: Tensor, parts: Tensor, anchor: float) -> Tensor:
    """Values whose layer's parts are rescaled to the norm ``anchor``, in the dtype of the values.

    Args:
        values: v, [n, d_v].
        parts: w, [n, d_v]; a part of norm 0 stays as it is.
        anchor: a.
    """
    w = parts.double()
    norm = w.norm(dim=1, keepdim=True)
    return (values.double() + (anchor / norm.where(norm > 0, anchor) - 1) * w).to(values)


def parts_of(lm: LanguageModel, facts: Sequence[Fact], site: Site, values: Tensor) -> Tensor:
    """The layer's parts w of values, float64 [n, d_v], on the weights as they are; several ranks share the passes.

    Args:
        lm: the model.
        facts: the facts.
        site: the site of the values.
        values: v, [n, d_v], found on these weights.
    """
    located = [locate(lm, fact) for fact in facts]
    rows = [encoding.ids[: last + 1] for encoding, last in located]
    modules = {"layer": (lm.anatomy.edit_module(site.layer), "output"), "site": (site.module, "output")}

    def read(group: Sequence[int]) -> list[Tensor]:
        seen = lm.read([rows[i] for i in group], modules, stop="site")
        return [one["layer"][-1].float().cpu().double() - one["site"][-1].float().cpu().double() for one in seen]

    return torch.stack(ranks.each(lm.passes(rows), read)) + values.cpu().double()
