"""Values v*: what the edited layer should give at a subject's last token so that the new target follows.

A vector is added to the site's output at that token and optimized by Adam so that the target becomes likely in the
bare prompt and in a few contexts, with a KL term that keeps "{subject} is a" as it was, weight decay, and a ball
around the original (ROME section 3.1, arXiv:2202.05262; MEMIT section 4.2, arXiv:2210.07229)::

    loss = mean over contexts, tokens (-log p(target)) + kl_factor * KL(edited || initial)
           + weight_decay * ||delta|| / ||v0||^2,          ||delta|| <= clamp * ||v0||

All facts of a batch are optimized at once, one row of the vector each. What does not depend on the vector is computed
once: blocks up to the site, and the keys and values of all tokens left of the subject's last. Facts whose loss is
under the threshold leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from editlab import ranks
from editlab.data.fact import Fact
from editlab.errors import EditLabError, UserError
from editlab.keys import Site, locate
from editlab.lm.language_model import LanguageModel
from editlab.lm.products import MATMULS, products
from editlab.lm.running import adding, by_row, logits_only_at, reading, starting_at
from editlab.lm.tokens import by_length, encode, join, pad

KL_PROMPT = "{} is a"
"""The essence prompt: what a subject is should not change with one of its facts."""

DEFAULT_LR = {"adam": 0.5, "gradient": 0.06}
"""Optimizer -> its step size on SmolLM2-135M."""

MOMENTUM = 0.5
"""Share of the last direction in a step along the gradient."""


@dataclass
class ValueSettings:
    """How values are found. The defaults are those measured to work on SmolLM2-135M."""

    steps: int = 25
    """Evaluations of the loss; there is one update less."""
    optimizer: str = "adam"
    """``adam``, as the reference codes have it; or ``gradient``: steps along the normalized gradient, with momentum.
    Adam moves every coordinate by as much, those too that the loss hardly depends on, so its vectors are longer."""
    lr: float | None = None
    """Step size: Adam's (0.5 where not given), or the gradient's step as a share of ||v0|| (0.06)."""
    weight_decay: float = 1e-3
    """Weight of ||delta|| / ||v0||^2."""
    kl_factor: float = 0.0625
    """Weight of the KL term."""
    clamp: float = 0.75
    """Radius of the ball around v0, as a share of ||v0||."""
    loss_threshold: float = 5e-2
    """A fact whose loss is under this is done."""
    reference: str = "current"
    """``current``: values are found on the weights as they are; ``original``: on the unedited ones, once for all runs
    (they are kept in the cache folder)."""
    batch_tokens: int = 512
    """Padded tokens optimized together. It bounds memory and changes results only by rounding; on a CPU larger groups
    are slower, as they outgrow its caches. Groups are what several ranks share."""
    matmul: str = "auto"
    """``float32``; ``bfloat16``: matrix products in the blocks above the site, which rounds values (by 2% of their norm
    on SmolLM2-135M, at the same loss); ``auto``: bfloat16 on CPUs with instructions for it. For float32 weights."""

    def __post_init__(self) -> None:
        if self.optimizer not in DEFAULT_LR:
            raise UserError(f"model.values.optimizer is {self.optimizer!r}: it must be 'adam' or 'gradient'.")
        if self.lr is None:
            self.lr = DEFAULT_LR[self.optimizer]
        for name in ("steps", "lr", "clamp", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.values.{name} is {getattr(self, name)}: it must be above 0.")
        for name in ("weight_decay", "kl_factor", "loss_threshold"):
            if getattr(self, name) < 0:
                raise UserError(f"model.values.{name} is {getattr(self, name)}: it must not be negative.")
        if self.reference not in ("current", "original"):
            raise UserError(f"model.values.reference is {self.reference!r}: it must be 'current' or 'original'.")
        if self.matmul not in MATMULS:
            raise UserError(f"model.values.matmul is {self.matmul!r}: it must be one of {', '.join(MATMULS)}.")


@dataclass
class Values:
    """Targets of some facts, in their order."""

    target: Tensor
    """float32 [n, d_v]: what the site should give at the subject's last token of the bare prompt"""
    loss: Tensor
    """float32 [n]: the loss when the fact was done"""
    steps: Tensor
    """long [n]: evaluations of the loss that the fact took part in"""


@dataclass
class _Row:
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


def optimize_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    contexts: Sequence[str],
    settings: ValueSettings,
    progress: Callable[[int], object] | None = None,
) -> Values:
    """Values of all facts, on the weights as they are; several ranks share the work.

    Args:
        lm: the model.
        facts: the facts; their order does not matter to the result beyond rounding.
        site: where the vector is added.
        contexts: prefixes, the empty one first.
        settings: hyper-parameters.
        progress: called with the number of facts each time some are done.

    Raises:
        UserError: where a target begins within the subject's last token.
        EditLabError: where a loss is not finite.
    """
    rows = [_rows_of(lm, i, fact, contexts) for i, fact in enumerate(facts)]
    padded = [max(len(r.tail) for r in some) * len(some) for some in rows]
    d = lm.anatomy.value_size(site.layer)
    values = Values(torch.zeros(len(facts), d), torch.zeros(len(facts)), torch.zeros(len(facts), dtype=torch.long))
    left = len(facts)

    def optimize(group: Sequence[int]) -> list[tuple[Tensor, ...]]:
        nonlocal left
        target, loss, steps = _Group(lm, site, [rows[i] for i in group], settings).optimize()
        left -= len(group)
        if progress is not None:
            progress(len(group))
        return list(zip(target.cpu(), loss.cpu(), steps.cpu(), strict=True))

    with _products_above(lm, site, settings):
        found = ranks.each(by_length(padded, settings.batch_tokens), optimize)
    for i, (target, loss, steps) in enumerate(found):
        values.target[i], values.loss[i], values.steps[i] = target, loss, steps
    if progress is not None and left:
        progress(left)  # those of other ranks
    if not bool(torch.isfinite(values.target).all()):
        bad = facts[int((~torch.isfinite(values.target)).any(1).nonzero()[0])]
        raise EditLabError(
            f"The value of {bad.question!r} is not finite: lower model.values.lr, or use a wider trainer.precision."
        )
    return values


def _products_above(lm: LanguageModel, site: Site, settings: ValueSettings) -> AbstractContextManager[None]:
    """Products as the settings want them in the blocks above the site; keys and v0 come from below, unrounded."""
    return products(settings.matmul, list(lm.anatomy.blocks)[site.layer + 1 :], lm.anatomy.edit_path, lm.device)


def _rows_of(lm: LanguageModel, number: int, fact: Fact, contexts: Sequence[str]) -> list[_Row]:
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
        rows.append(_Row(number, ids[:last], ids[last:-1], wanted, 1 / (len(wanted) * len(contexts))))
    essence = Fact(fact.subject, KL_PROMPT, fact.target_new)
    encoding, last = locate(lm, essence)
    rows.append(_Row(number, encoding.ids[:last], encoding.ids[last:], [], 0.0))
    return rows


class _Group:
    """Facts that are optimized together: their rows as tensors, and what is computed once for all steps."""

    def __init__(self, lm: LanguageModel, site: Site, facts: list[list[_Row]], settings: ValueSettings) -> None:
        self.lm, self.site, self.settings = lm, site, settings
        device = lm.device
        rows = [row for some in facts for row in some]
        self.row_fact = torch.tensor([i for i, some in enumerate(facts) for _ in some], device=device)
        self.bare_row = torch.tensor([sum(len(f) for f in facts[:i]) for i in range(len(facts))], device=device)
        prefixes = list(dict.fromkeys(r.prefix for r in rows))
        which = torch.tensor([prefixes.index(r.prefix) for r in rows])
        prefix, prefix_mask = pad(prefixes, left=True)
        tail, tail_mask = pad([r.tail for r in rows])
        self.tail, self.mask = tail.to(device), torch.cat([prefix_mask[which], tail_mask], 1).to(device)
        starts = prefix_mask[which].sum(1, keepdim=True)
        self.positions = (starts + torch.arange(tail.shape[1])).to(device)
        flat = [(i, p, t, r.weight) for i, r in enumerate(rows) for p, t in r.wanted]
        self.at_row = torch.tensor([f[0] for f in flat], device=device)
        self.at_column = torch.tensor([f[1] for f in flat], device=device)
        self.token = torch.tensor([f[2] for f in flat], device=device)
        self.weight = torch.tensor([f[3] for f in flat], device=device)
        self.kl_row = torch.tensor([i for i, r in enumerate(rows) if not r.wanted], device=device)
        self.kl_column = torch.tensor([len(r.tail) - 1 for r in rows if not r.wanted], device=device)
        self.first_block = site.layer + 1 if site.in_stream else site.layer
        self._read_prefixes(prefix, prefix_mask, which.to(device))
        self._read_tails()

    @torch.no_grad()
    def _read_prefixes(self, ids: Tensor, mask: Tensor, which: Tensor) -> None:
        """Keys and values of all blocks for each different prefix, once; ``which`` says whose row has which."""
        self.past: list[tuple[Tensor, Tensor]] = []
        if ids.shape[1] == 0:
            return
        # A row without any prefix is all padding, which nothing reads; attending to it keeps its content finite.
        mask = torch.where(mask.any(1, keepdim=True), mask, 1)
        cache = DynamicCache()
        zero = torch.zeros(1, dtype=torch.long, device=self.lm.device)
        with logits_only_at(self.lm.anatomy.head, zero, zero):
            self.lm.run(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache, use_cache=True)
        self.past = [(_rows(layer.keys, which), _rows(layer.values, which)) for layer in cache.layers]  # type: ignore[union-attr,arg-type]

    @torch.no_grad()
    def _read_tails(self) -> None:
        """The tails' hidden states where the vector comes in, and v0; blocks above do not run."""
        enters: dict[object, tuple[torch.nn.Module, str]] = {
            "hidden": (self.lm.anatomy.blocks[self.site.layer], "output" if self.site.in_stream else "input"),
            "site": (self.site.module, "output"),
        }
        # With the site in the stream both are one module's output, and hooks run in the order of the dict.
        with reading(enters, stop="site") as seen:
            self.lm.run(self.tail, self.mask, self.positions, past_key_values=self._cache(), use_cache=True)
        rows = len(self.tail)
        self.hidden = by_row(seen["hidden"], rows).clone().to(self.lm.device)
        self.origin = by_row(seen["site"], rows).to(self.lm.device)[self.bare_row, 0].float()
        for i in range(min(self.first_block, len(self.past))):
            # Blocks that are stepped over need an entry of the right length and no content.
            key, value = (t[:1, :, :, :1].expand(len(t), -1, -1, -1) for t in self.past[i])
            self.past[i] = (key, value)

    def _cache(self) -> DynamicCache:
        """The prefixes' keys and values as the model takes them; made anew for each pass, which adds to it."""
        cache = DynamicCache()
        for i, (key, value) in enumerate(self.past):
            cache.update(key, value, i)
        return cache

    def optimize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Adam on all facts of the group; returns targets [n, d_v], losses [n] and steps [n]."""
        n, settings = len(self.origin), self.settings
        delta = torch.zeros_like(self.origin, requires_grad=True)
        size = self.origin.norm(dim=1)
        radius = settings.clamp * size
        normalized = settings.optimizer == "gradient"
        assert settings.lr is not None  # set with the other settings
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD([delta], settings.lr, momentum=MOMENTUM, dampening=MOMENTUM)
            if normalized
            else torch.optim.Adam([delta], settings.lr)
        )
        done = torch.zeros_like(self.origin)
        final_loss = torch.zeros(n, device=delta.device)
        steps = torch.zeros(n, dtype=torch.long, device=delta.device)
        active = torch.arange(n, device=delta.device)
        initial: Tensor | None = None
        for step in range(settings.steps):
            loss, log_probs = self._loss(delta, active, initial)
            if initial is None:
                initial = log_probs
            leaving = loss.detach() < settings.loss_threshold
            if step == settings.steps - 1:
                leaving = torch.ones_like(leaving)
            gone = active[leaving]
            done[gone], final_loss[gone], steps[gone] = delta.detach()[gone], loss.detach()[leaving], step + 1
            if bool(leaving.all()):
                break
            (gradient,) = torch.autograd.grad(loss.sum(), delta)
            if normalized:
                gradient = gradient * (size / gradient.norm(dim=1).clamp_min(1e-20))[:, None]
            delta.grad = gradient
            optimizer.step()
            with torch.no_grad():
                delta.mul_((radius / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None])
            if bool(leaving.any()):
                initial = initial[~leaving]
                active = active[~leaving]
                self._keep(~leaving)
        return self.origin + done, final_loss, steps

    def _loss(self, delta: Tensor, active: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each active fact's loss, and the log-probabilities after its KL prompt (without gradient)."""
        here = delta[active]
        shift = here[self.row_fact].to(self.hidden.dtype)
        wanted, essence = self._logits(shift).split([len(self.at_row), len(self.kl_row)])
        surprise = cross_entropy(wanted, self.token, reduction="none")
        nll = torch.zeros_like(here[:, 0]).index_add(0, self.row_fact[self.at_row], surprise * self.weight)
        edited = torch.log_softmax(essence, dim=1)
        before = edited.detach() if initial is None else initial
        divergence = (edited.exp() * (edited - before)).sum(1)
        # The gradient of a norm is not defined at 0, where the first step starts: its square root is guarded.
        size = (here.square().sum(1) + 1e-24).sqrt()
        decay = self.settings.weight_decay * size / self.origin[active].norm(dim=1) ** 2
        return nll + self.settings.kl_factor * divergence + decay, edited.detach()

    def _logits(self, shift: Tensor) -> Tensor:
        """Float32 logits at the wanted positions and then at the KL positions, [n, vocabulary]."""
        cache = self._cache()
        anatomy, hidden = self.lm.anatomy, self.hidden
        rows, columns = torch.cat([self.at_row, self.kl_row]), torch.cat([self.at_column, self.kl_column])
        if self.site.in_stream:
            hidden = torch.cat([hidden[:, :1] + shift[:, None], hidden[:, 1:]], 1)
        with (
            starting_at(anatomy.blocks, self.first_block, hidden, self.lm.blocks_give_tuples),
            logits_only_at(anatomy.head, rows, columns),
        ):
            run = lambda: self.lm.run(self.tail, self.mask, self.positions, past_key_values=cache, use_cache=True)
            if self.site.in_stream:
                return run().logits[0].float()
            with adding(self.site.module, 0, shift):
                return run().logits[0].float()

    def _keep(self, facts: Tensor) -> None:
        """Drops the rows of facts that are done; ``facts`` is bool over those that were active."""
        rows = facts[self.row_fact]
        renumber = torch.cumsum(rows, 0) - 1
        refact = torch.cumsum(facts, 0) - 1
        wanted, kl = rows[self.at_row], rows[self.kl_row]
        self.at_row, self.at_column = renumber[self.at_row[wanted]], self.at_column[wanted]
        self.token, self.weight = self.token[wanted], self.weight[wanted]
        self.kl_row, self.kl_column = renumber[self.kl_row[kl]], self.kl_column[kl]
        self.row_fact = refact[self.row_fact[rows]]
        self.tail, self.mask, self.positions = self.tail[rows], self.mask[rows], self.positions[rows]
        self.hidden = self.hidden[rows]
        self.past = [(_rows(key, rows), _rows(value, rows)) for key, value in self.past]


def _rows(cached: Tensor, rows: Tensor) -> Tensor:
    """Rows of one block's keys or values, which lie where the block runs."""
    return cached[rows.to(cached.device)]
