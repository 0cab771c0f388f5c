"""The loss of values v*: the prompts of a group of facts as tensors, and the part of the model that each step runs.

The part that does not depend on the vectors is computed once: the blocks up to the site, and the KV cache of all tokens
before the subject's last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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

KL_PROMPT = "{} is a"
"""The essence prompt of the KL term: an edit of one fact should not change what kind of thing the subject is."""


@dataclass
class Row:
    """One prompt of one fact, cut at the subject's last token."""

    fact: int
    """number of the fact in its group"""
    prefix: tuple[int, ...]
    """tokens before the subject's last one"""
    tail: tuple[int, ...]
    """tokens from the subject's last one on, without the target's last one, from which nothing is predicted"""
    wanted: list[tuple[int, int]]
    """(position in the tail, token that should follow it); empty for the essence prompt"""
    weight: float
    """weight of each wanted token in the fact's loss"""


KL_POSITIONS = (PROMPT, SUBJECT) = ("prompt", "subject")
"""Tokens of the essence prompt after which the KL term can compare predictions: its last one, or the subject's last."""


def rows_of(lm: LanguageModel, number: int, fact: Fact, contexts: Sequence[str], kl_at: str = PROMPT) -> list[Row]:
    """The prompts of one fact, numbered ``number`` in its group: one for each context, and the essence prompt.

    Args:
        lm: the model.
        number: number of the fact in its group.
        fact: the fact.
        contexts: prefixes of its prompt.
        kl_at: token of the essence prompt after which the KL term compares predictions, of :data:`KL_POSITIONS`. The
            row ends there, since no prediction depends on later tokens.

    Raises:
        UserError: The target has no token, or begins within the subject's last token.
    """
    rows = []
    for context in contexts:
        encoding, start = lm.encode_pair(lm.in_context(context, fact.question), fact.target_new)
        last = encoding.token_at(len(context) + fact.subject_span[1])
        ids = encoding.ids
        if start <= last:
            raise UserError(
                f"In {fact.question!r} the target {fact.target_new!r} does not begin after the subject's last token: "
                "put a space or a word between them."
            )
        wanted = [(p - 1 - last, ids[p]) for p in range(start, len(ids))]
        rows.append(Row(number, ids[:last], ids[last:-1], wanted, 1 / (len(wanted) * len(contexts))))
    essence = Fact(fact.subject, KL_PROMPT, fact.target_new)
    encoding, last = locate(lm, essence)
    end = last + 1 if kl_at == SUBJECT else len(encoding.ids)
    rows.append(Row(number, encoding.ids[:last], encoding.ids[last:end], [], 0.0))
    return rows


def in_turn(rows: Sequence[Row], turn: Sequence[int]) -> list[Row]:
    """The rows of one fact (:func:`rows_of`) that a part of the contexts has, weighted as if there were no others.

    Args:
        rows: one row for each context, and the essence prompt.
        turn: indices of the contexts.
    """
    factor = (len(rows) - 1) / len(turn)
    return [*(replace(rows[i], weight=factor * rows[i].weight) for i in turn), rows[-1]]


class Losses(NamedTuple):
    """Parts of the loss of each active fact, [active facts], and whether its target is predicted."""

    nll: Tensor
    """mean over contexts and target tokens of -log p(token), in nats"""
    divergence: Tensor
    """KL(edited || initial) after the essence prompt, in nats"""
    hit: Tensor
    """whether every token of the target is the argmax in every context"""


class ValueGroup:
    """Facts that are optimized together: their rows as tensors, and the results that all steps share.

    A fact is *active* until :meth:`keep` drops it.

    Args:
        lm: the model.
        site: the site whose output the vectors are added to.
        facts: rows of each fact, that of the bare prompt first.
        with_keys: whether to read the facts' keys too.
    """

    keys: Tensor
    """[facts, d_k]: inputs of the edited layer at the subjects' last tokens in the bare prompts; only ``with_keys``"""

    def __init__(self, lm: LanguageModel, site: Site, facts: list[list[Row]], with_keys: bool = False) -> None:
        self.lm, self.site = lm, site
        rows = [row for some in facts for row in some]
        self.indices = _Indices.of(rows)
        bare = torch.tensor([sum(len(f) for f in facts[:i]) for i in range(len(facts))], device=lm.device)
        past = read_prefixes(lm, [[row.prefix for row in some] for some in facts])
        self.layout = lay_out(lm, [row.tail for row in rows], past)
        self.first_block = site.layer + 1 if site.in_stream else site.layer
        self.initial: Tensor | None = None
        self._read_tails(bare, with_keys)
        self._locate()

    @torch.no_grad()
    def _read_tails(self, bare: Tensor, with_keys: bool) -> None:
        """Reads the tails' hidden states where the vector is added, and v0; blocks above do not run."""
        enters: dict[object, tuple[torch.nn.Module, str]] = {
            "hidden": (self.lm.anatomy.blocks[self.site.layer], "output" if self.site.in_stream else "input"),
            "site": (self.site.module, "output"),
        }
        if with_keys:
            enters["key"] = (self.lm.anatomy.edit_module(self.site.layer), "input")
        # With the site in the stream, both are the output of one module, whose hooks run in the order of the dict.
        with reading(enters, stop="site") as seen:
            self.layout.run()
        self.hidden, given = (by_row(seen[name], self.layout.rows).to(self.lm.device) for name in ("hidden", "site"))
        self.origin = given[self._subjects(bare)].float()
        if with_keys:
            self.keys = by_row(seen["key"], self.layout.rows).to(self.lm.device)[self._subjects(bare)]
        self.layout.prefix.free_blocks(self.first_block)

    def _subjects(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column in the tensor of the subjects' last tokens in some rows."""
        return self.layout.locate(rows, torch.zeros_like(rows))

    def _locate(self) -> None:
        """Sends the indices to the device and computes the positions that all steps use until facts are dropped."""
        self.there = self.indices.to(self.lm.device)
        rows, columns = (
            torch.cat([self.there.at_row, self.there.kl_row]),
            torch.cat([self.there.at_column, self.there.kl_column]),
        )
        self.logit_positions = self.layout.locate(rows, columns)
        self.subjects = self._subjects(torch.arange(len(self.there.row_fact), device=self.lm.device))

    def losses(self, delta: Tensor) -> Losses:
        """Parts of the loss with the vectors ``delta`` [active facts, d_v] added, with gradients.

        The KL term compares later calls with the first one, in which ``delta`` therefore has to be 0.
        """
        there = self.there
        shift = delta[there.row_fact].to(self.hidden.dtype)
        wanted, essence = self._logits(shift).split([len(there.at_row), len(there.kl_row)])
        token_nll = cross_entropy(wanted, there.token, reduction="none")
        nll = torch.zeros_like(delta[:, 0]).index_add(0, there.at_fact, token_nll * there.weight)
        missed = there.token.new_zeros(len(delta)).index_add(0, there.at_fact, (wanted.argmax(1) != there.token).long())
        edited = torch.log_softmax(essence, dim=1)
        if self.initial is None:
            self.initial = edited.detach()
        divergence = (edited.exp() * (edited - self.initial)).sum(1)
        return Losses(nll, divergence, missed == 0)

    def _logits(self, shift: Tensor) -> Tensor:
        """Float32 logits where wanted tokens are predicted, then at the ends of essence prompts, [n, vocabulary]."""
        anatomy, hidden = self.lm.anatomy, self.hidden
        if self.site.in_stream:
            hidden = hidden.index_put(self.subjects, shift, accumulate=True)
        with (
            starting_at(anatomy.blocks, self.first_block, hidden, self.lm.blocks_give_tuples),
            logits_only_at(anatomy.head, *self.logit_positions),
            nullcontext() if self.site.in_stream else adding(self.site.module, self.subjects, shift, self.layout.rows),
        ):
            logits: Tensor = self.layout.run().logits[0].float()
        return logits

    def keep(self, facts: Tensor) -> None:
        """Drops the rows of facts that are done, without waiting for the device.

        Args:
            facts: bool [active facts], on the CPU; False for a fact that is done.
        """
        assert self.initial is not None  # the first evaluation sets it
        kept = facts.nonzero()[:, 0].to(self.initial.device, non_blocking=True)
        self.initial = self.initial[kept]
        self.hidden = self.layout.keep(facts[self.indices.row_fact], self.hidden)
        self.indices = self.indices.keep(facts)
        self._locate()


class _Indices(NamedTuple):
    """The rows, columns and tokens that the loss of a group is computed from."""

    row_fact: Tensor
    """long [rows]: the fact of each row"""
    at_row: Tensor
    """long [wanted tokens]: the row of each token"""
    at_column: Tensor
    """long [wanted tokens]: the position in the row's tail that predicts it"""
    at_fact: Tensor
    """long [wanted tokens]: the fact of each token"""
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
        """The indices of a group's rows, on the CPU."""
        flat = [(i, p, r.fact, t, r.weight) for i, r in enumerate(rows) for p, t in r.wanted]
        numbers = {fact: i for i, fact in enumerate(dict.fromkeys(r.fact for r in rows))}
        return cls(
            row_fact=torch.tensor([numbers[r.fact] for r in rows]),
            at_row=torch.tensor([f[0] for f in flat]),
            at_column=torch.tensor([f[1] for f in flat]),
            at_fact=torch.tensor([numbers[f[2]] for f in flat]),
            token=torch.tensor([f[3] for f in flat]),
            weight=torch.tensor([f[4] for f in flat], dtype=torch.float32),
            kl_row=torch.tensor([i for i, r in enumerate(rows) if not r.wanted], dtype=torch.long),
            kl_column=torch.tensor([len(r.tail) - 1 for r in rows if not r.wanted], dtype=torch.long),
        )

    def to(self, device: torch.device) -> _Indices:
        """The same indices on a device, without waiting for it."""
        return _Indices(*(tensor.to(device, non_blocking=True) for tensor in self))

    def keep(self, facts: Tensor) -> _Indices:
        """The indices of the facts for which ``facts`` [active facts] is True; they are renumbered."""
        rows = facts[self.row_fact]
        new_row, new_fact = torch.cumsum(rows, 0) - 1, torch.cumsum(facts, 0) - 1
        wanted, kl = rows[self.at_row], rows[self.kl_row]
        return _Indices(
            new_fact[self.row_fact[rows]], new_row[self.at_row[wanted]], self.at_column[wanted],
            new_fact[self.at_fact[wanted]], self.token[wanted], self.weight[wanted], new_row[self.kl_row[kl]],
            self.kl_column[kl],
        )  # fmt: skip
