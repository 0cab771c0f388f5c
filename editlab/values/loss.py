"""The loss of values v*: some facts' prompts as tensors, and what of the model has to run for them at each step.

What does not depend on the vectors is computed once: blocks up to the site, and the keys and values of all tokens left
of the subject's last.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.keys.subject_keys import Site, locate
from editlab.lm.forward import adding, by_row, logits_only_at, reading, starting_at
from editlab.lm.language_model import LanguageModel
from editlab.lm.packing import lay_out
from editlab.lm.prefix_cache import read_prefixes
from editlab.lm.tokens import encode, join

KL_PROMPT = "{} is a"
"""The essence prompt: what a subject is should not change with one of its facts."""


@dataclass
class Row:
    """One prompt of one fact, cut at the subject's last token."""

    fact: int
    prefix: tuple[int, ...]
    """tokens left of the subject's last"""
    tail: tuple[int, ...]
    """tokens from the subject's last on, without the target's last (nothing is predicted from it)"""
    wanted: list[tuple[int, int]]
    """(position in the tail, token that should follow); empty for the KL prompt"""
    weight: float
    """of each wanted token in the fact's loss"""


def rows_of(lm: LanguageModel, number: int, fact: Fact, contexts: Sequence[str]) -> list[Row]:
    """The prompts of one fact, numbered ``number`` in its group: one a context, and the essence prompt.

    Raises:
        UserError: where the target begins within the subject's last token.
    """
    rows = []
    for context in contexts:
        text = context + fact.question
        encoding = encode(lm.tokenizer, join(text, fact.target_new))
        last = encoding.token_at(len(context) + fact.subject_span[1])
        start = encoding.first_after(len(text.rstrip()))
        ids = encoding.ids
        if not last < start < len(ids):
            raise UserError(
                f"In {fact.question!r} the target {fact.target_new!r} does not begin after the subject's last token: "
                "put a space or a word between them."
            )
        wanted = [(p - 1 - last, ids[p]) for p in range(start, len(ids))]
        rows.append(Row(number, ids[:last], ids[last:-1], wanted, 1 / (len(wanted) * len(contexts))))
    essence = Fact(fact.subject, KL_PROMPT, fact.target_new)
    encoding, last = locate(lm, essence)
    rows.append(Row(number, encoding.ids[:last], encoding.ids[last:], [], 0.0))
    return rows


class Surprise(NamedTuple):
    """Of each fact that is left, [facts left]."""

    nll: Tensor
    """mean over contexts and target tokens of -log p(token), in nats"""
    divergence: Tensor
    """KL(edited || initial) after the essence prompt, in nats"""
    said: Tensor
    """whether every token of the target is the likeliest one in every context"""


class ValueGroup:
    """Facts that are optimized together: their rows as tensors, and what is computed once for all steps."""

    def __init__(self, lm: LanguageModel, site: Site, facts: list[list[Row]]) -> None:
        self.lm, self.site = lm, site
        rows = [row for some in facts for row in some]
        self.indices = _Indices.of(rows)
        bare = torch.tensor([sum(len(f) for f in facts[:i]) for i in range(len(facts))], device=lm.device)
        past = read_prefixes(lm, [[row.prefix for row in some] for some in facts])
        self.layout = lay_out(lm, [row.tail for row in rows], past)
        self.first_block = site.layer + 1 if site.in_stream else site.layer
        self.initial: Tensor | None = None
        self._read_tails(bare)
        self._locate()

    @torch.no_grad()
    def _read_tails(self, bare: Tensor) -> None:
        """The tails' hidden states where the vector comes in, and v0; blocks above do not run."""
        enters: dict[object, tuple[torch.nn.Module, str]] = {
            "hidden": (self.lm.anatomy.blocks[self.site.layer], "output" if self.site.in_stream else "input"),
            "site": (self.site.module, "output"),
        }
        # With the site in the stream both are one module's output, and hooks run in the order of the dict.
        with reading(enters, stop="site") as seen:
            self.layout.run()
        self.hidden, given = (by_row(seen[name], self.layout.rows).to(self.lm.device) for name in ("hidden", "site"))
        self.origin = given[self._subjects(bare)].float()
        self.layout.prefix.free_blocks(self.first_block)

    def _subjects(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column in the tensor of the subjects' last tokens in some rows."""
        return self.layout.locate(rows, torch.zeros_like(rows))

    def _locate(self) -> None:
        """Send the indices to the device, and find there what all steps need until facts leave."""
        self.there = self.indices.to(self.lm.device)
        rows, columns = (
            torch.cat([self.there.at_row, self.there.kl_row]),
            torch.cat([self.there.at_column, self.there.kl_column]),
        )
        self.asked = self.layout.locate(rows, columns)
        self.subjects = self._subjects(torch.arange(len(self.there.row_fact), device=self.lm.device))

    def surprise(self, delta: Tensor) -> Surprise:
        """What the targets cost with vectors ``delta`` [facts left, d_v] added; gradients flow.

        The first call is the one that later essence prompts are held against, so ``delta`` has to be 0 in it.
        """
        there = self.there
        shift = delta[there.row_fact].to(self.hidden.dtype)
        wanted, essence = self._logits(shift).split([len(there.at_row), len(there.kl_row)])
        surprise = cross_entropy(wanted, there.token, reduction="none")
        nll = torch.zeros_like(delta[:, 0]).index_add(0, there.at_fact, surprise * there.weight)
        missed = there.token.new_zeros(len(delta)).index_add(0, there.at_fact, (wanted.argmax(1) != there.token).long())
        edited = torch.log_softmax(essence, dim=1)
        if self.initial is None:
            self.initial = edited.detach()
        divergence = (edited.exp() * (edited - self.initial)).sum(1)
        return Surprise(nll, divergence, missed == 0)

    def _logits(self, shift: Tensor) -> Tensor:
        """Float32 logits at the wanted positions and then at the KL positions, [n, vocabulary]."""
        anatomy, hidden = self.lm.anatomy, self.hidden
        if self.site.in_stream:
            hidden = hidden.index_put(self.subjects, shift, accumulate=True)
        with (
            starting_at(anatomy.blocks, self.first_block, hidden, self.lm.blocks_give_tuples),
            logits_only_at(anatomy.head, *self.asked),
            nullcontext() if self.site.in_stream else adding(self.site.module, self.subjects, shift, self.layout.rows),
        ):
            logits: Tensor = self.layout.run().logits[0].float()
        return logits

    def keep(self, facts: Tensor) -> None:
        """Drop the rows of facts that are done, without waiting for the device.

        Args:
            facts: bool over the facts that were left, on the CPU; False for one that is done.
        """
        assert self.initial is not None  # the first evaluation sets it
        kept = facts.nonzero()[:, 0].to(self.initial.device, non_blocking=True)
        self.initial = self.initial[kept]
        self.hidden = self.layout.keep(facts[self.indices.row_fact], self.hidden)
        self.indices = self.indices.keep(facts)
        self._locate()


class _Indices(NamedTuple):
    """Which rows, columns and tokens the loss of a group looks at."""

    row_fact: Tensor
    """long [rows]: the fact of each row"""
    at_row: Tensor
    """long [wanted tokens]: the row of each"""
    at_column: Tensor
    """long [wanted tokens]: the position in the row's tail that predicts it"""
    at_fact: Tensor
    """long [wanted tokens]: the fact of each"""
    token: Tensor
    """long [wanted tokens]: the token itself"""
    weight: Tensor
    """float32 [wanted tokens]: its weight in its fact's loss"""
    kl_row: Tensor
    """long [facts]: the row of each essence prompt"""
    kl_column: Tensor
    """long [facts]: the last position of its tail"""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Indices:
        """Of the rows of a group, on the CPU."""
        flat = [(i, p, r.fact, t, r.weight) for i, r in enumerate(rows) for p, t in r.wanted]
        numbers = {fact: i for i, fact in enumerate(dict.fromkeys(r.fact for r in rows))}
        return cls(
            row_fact=torch.tensor([numbers[r.fact] for r in rows]),
            at_row=torch.tensor([f[0] for f in flat]),
            at_column=torch.tensor([f[1] for f in flat]),
            at_fact=torch.tensor([numbers[f[2]] for f in flat]),
            token=torch.tensor([f[3] for f in flat]),
            weight=torch.tensor([f[4] for f in flat], dtype=torch.float32),
            kl_row=torch.tensor([i for i, r in enumerate(rows) if not r.wanted]),
            kl_column=torch.tensor([len(r.tail) - 1 for r in rows if not r.wanted]),
        )

    def to(self, device: torch.device) -> _Indices:
        """The same on a device, without waiting for it."""
        return _Indices(*(tensor.to(device, non_blocking=True) for tensor in self))

    def keep(self, facts: Tensor) -> _Indices:
        """Those of some facts, which are numbered anew; ``facts`` is bool over all of them."""
        rows = facts[self.row_fact]
        new_row, new_fact = torch.cumsum(rows, 0) - 1, torch.cumsum(facts, 0) - 1
        wanted, kl = rows[self.at_row], rows[self.kl_row]
        return _Indices(
            new_fact[self.row_fact[rows]], new_row[self.at_row[wanted]], self.at_column[wanted],
            new_fact[self.at_fact[wanted]], self.token[wanted], self.weight[wanted], new_row[self.kl_row[kl]],
            self.kl_column[kl],
        )  # fmt: skip
