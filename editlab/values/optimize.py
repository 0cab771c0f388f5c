"""Values v*: the output of the edited layer at a subject's last token that makes the model predict the new target.

A vector is added to the site's output at that token and optimized by Adam so that the target becomes likely in the
bare prompt and in a few contexts. A KL term preserves the prediction after "{subject} is a" (``kl_at: prompt``, as in
the papers) or after the subject in that prompt (``kl_at: subject``, as in the authors' codes); weight decay and a ball
around the original output limit the vector (ROME section 3.1, arXiv:2202.05262; MEMIT section 4.2, arXiv:2210.07229)::

    loss = mean over contexts, tokens (-log p(target)) + kl_factor * KL(edited || initial)
           + weight_decay * ||delta|| / ||v0||^2,          ||delta|| <= clamp * ||v0||

All facts of a batch are optimized at once, each with a vector of its own; :mod:`editlab.values.loss` computes the loss.
Facts whose loss is under the threshold leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import TOKENS_A_PASS, LanguageModel
from editlab.lm.matmul import products
from editlab.lm.memory import by_halves, spare_gpu_memory
from editlab.lm.tokens import by_length
from editlab.values.loss import ValueGroup, in_turn, rows_of
from editlab.values.settings import ValueSettings

FEWEST_TOKENS = 512
"""Least number of padded tokens that are optimized together by default."""


@dataclass
class Values:
    """Targets v* of some facts, in the order of the facts."""

    target: Tensor
    """float32 [n, d_v]: output that the site should have at the subject's last token in the bare prompt"""
    loss: Tensor
    """float32 [n]: the loss at the end of the optimization"""
    steps: Tensor
    """long [n]: number of evaluations of the fact's loss"""


def optimize_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    contexts: Sequence[str],
    settings: ValueSettings,
    progress: Callable[[int], object] | None = None,
    reserved: int = 0,
) -> Values:
    """Optimizes the values of all facts on the weights as they are; several ranks share the work.

    Args:
        lm: the model.
        facts: the facts; their order does not matter to the result beyond rounding.
        site: the site whose output the vector is added to.
        contexts: prefixes, the empty one first.
        settings: hyper-parameters.
        progress: called after each group with its number of facts.
        reserved: as for :func:`tokens_together`.

    Raises:
        UserError: A target begins within the subject's last token, no target depends on the site, or there are fewer
            steps than turns of the contexts.
        EditLabError: A value is not finite.
    """
    turns = turns_of(len(contexts), settings)
    rows = [rows_of(lm, i, fact, contexts, settings.kl_position) for i, fact in enumerate(facts)]
    padded = [max(len(r.tail) for r in some) * (len(turns[0]) + 1) for some in rows]
    d = lm.anatomy.value_size(site.layer)
    values = Values(torch.zeros(len(facts), d), torch.zeros(len(facts)), torch.zeros(len(facts), dtype=torch.long))
    left = len(facts)

    def optimize(group: Sequence[int]) -> list[tuple[Tensor, ...]]:
        nonlocal left
        parts = [ValueGroup(lm, site, [in_turn(rows[i], turn) for i in group]) for turn in turns]
        target, loss, steps = _optimize(parts, settings)
        left -= len(group)
        if progress is not None:
            progress(len(group))
        return list(zip(target.cpu(), loss.cpu(), steps.cpu(), strict=True))

    with products_above(lm, site, settings):
        groups = by_length(padded, settings.batch_tokens or tokens_together(lm, site, reserved))
        found = ranks.each(groups, partial(by_halves, optimize))
    for i, (target, loss, steps) in enumerate(found):
        values.target[i], values.loss[i], values.steps[i] = target, loss, steps
    if progress is not None and left:
        progress(left)  # facts of other ranks
    if not bool(torch.isfinite(values.target).all()):
        bad = facts[int((~torch.isfinite(values.target)).any(1).nonzero()[0])]
        raise EditLabError(
            f"The value of {bad.question!r} is not finite: lower model.values.lr, or use a wider trainer.precision."
        )
    return values


def turns_of(contexts: int, settings: ValueSettings) -> list[range]:
    """The indices of the contexts that each of the turns evaluates, dealt out in their order; the longest turn first.

    Args:
        contexts: number of contexts.
        settings: the settings, of which ``contexts_a_step`` counts.

    Raises:
        UserError: There are fewer steps than turns.
    """
    turns = math.ceil(contexts / min(settings.contexts_a_step or contexts, contexts))
    if settings.steps < turns:
        raise UserError(
            f"model.values.steps is {settings.steps}, and {contexts} contexts take {turns} turns: set at least {turns} "
            "steps, or more model.values.contexts_a_step."
        )
    return [range(turn, contexts, turns) for turn in range(turns)]


def tokens_together(lm: LanguageModel, site: Site, reserved: int = 0) -> int:
    """Default number of padded tokens that are optimized together (:attr:`ValueSettings.batch_tokens`).

    Args:
        lm: the model.
        site: the site whose output the vector is added to.
        reserved: bytes that other tensors will use on the model's devices, such as the metrics' factors.
    """
    room = spare_gpu_memory(lm.model, reserved)
    if room is None:
        return FEWEST_TOKENS
    # For each token and block the backward pass keeps about ten states of the stream's width and four of the MLP's.
    states = 10 * lm.anatomy.value_size(site.layer) + 4 * lm.anatomy.key_size(site.layer)
    above = len(lm.anatomy.blocks) - site.layer
    each = states * above * next(lm.model.parameters()).element_size()
    # At worst logits are kept at every token: in the model's type, in float32, and two gradients of these.
    each += 4 * 4 * lm.model.config.get_text_config(decoder=True).vocab_size
    return max(FEWEST_TOKENS, min(TOKENS_A_PASS, room // 2 // each))


def products_above(lm: LanguageModel, site: Site, settings: ValueSettings) -> AbstractContextManager[None]:
    """Applies the settings' type of matrix products above the site and in the head; keys and v0 come from below it."""
    above = list(lm.anatomy.blocks)[site.layer + 1 :]
    return products(settings.matmul, above, lm.anatomy.edit_path, lm.device, lm.anatomy.head)


def _optimize(parts: Sequence[ValueGroup], settings: ValueSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Optimizes the values of a group of facts; returns targets [n, d_v], losses [n] and steps [n].

    Each part has the contexts of one turn, and the first one has the bare prompt too.
    """
    origin = parts[0].origin
    contexts = [len(part.indices.row_fact) - len(origin) for part in parts]  # all rows but the essence prompts
    shares = torch.tensor(contexts, device=origin.device)[:, None] / sum(contexts)
    delta = torch.zeros_like(origin, requires_grad=True)
    size = origin.norm(dim=1)
    radius = settings.clamp * size
    optimizer = torch.optim.Adam([delta], settings.step_size, settings.betas)
    done, final_loss = torch.zeros_like(origin), torch.zeros_like(size)
    steps = torch.zeros(len(origin), dtype=torch.long)
    # The indices of active facts are also on the CPU: the host waits for the device only once a step, to learn which
    # facts are done.
    active, active_on_device = torch.arange(len(origin)), torch.arange(len(origin), device=origin.device)
    hit_streak = torch.zeros_like(active_on_device)
    latest = torch.full((len(parts), len(origin)), torch.inf, device=origin.device)
    reached: Tensor | None = None
    for step in range(settings.steps):
        turn = step % len(parts)
        every = len(active) == len(origin)
        loss, hits = loss_of(
            parts[turn],
            delta if every else delta[active_on_device],
            size if every else size[active_on_device],
            settings,
        )
        latest[turn] = loss.detach()
        mean_loss = latest[0] if len(parts) == 1 else (shares * latest).sum(0)
        hit_streak = torch.where(hits, hit_streak + 1, 0)
        leaving_on_device = mean_loss < settings.loss_threshold
        if settings.early_stop:
            leaving_on_device = leaving_on_device | (hit_streak >= settings.early_stop * len(parts))
        flags = leaving_on_device if reached is None else torch.cat([leaving_on_device, reached[None]])
        known = flags.cpu()
        if reached is not None:
            require_effect(bool(known[-1]), parts[0].site)
            reached = None
        leaving = known[: len(active)]
        if step == settings.steps - 1:
            leaving = torch.ones_like(leaving)
        if bool(leaving.any()):
            which, gone = (t.to(origin.device, non_blocking=True) for t in (leaving.nonzero()[:, 0], active[leaving]))
            done[gone], final_loss[gone] = delta.detach()[gone], mean_loss[which]
            steps[active[leaving]] = step + 1
        if bool(leaving.all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        if step == 0:
            reached = gradient.any()
            for part in parts[1:]:
                part.initial = parts[0].initial  # of the same essence prompts, without a vector
        delta.grad = gradient
        optimizer.param_groups[0]["lr"] = settings.step_size_of(step)
        optimizer.step()
        with torch.no_grad():
            delta.mul_((radius / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None])
        if bool(leaving.any()):
            active = active[~leaving]
            stay, active_on_device = (
                t.to(origin.device, non_blocking=True) for t in ((~leaving).nonzero()[:, 0], active)
            )
            hit_streak, latest = hit_streak[stay], latest[:, stay]
            for part in parts:
                part.keep(~leaving)
    return origin + done, final_loss, steps


def require_effect(reached: bool, site: Site) -> None:
    """Refuses a site whose gradient is exactly 0: above the last block, or below quantized products without a gradient.

    Raises:
        UserError: The gradient is 0.
    """
    if not reached:
        raise UserError(
            f"The output of layer {site.layer} at a subject's last token affects no target, so there is no value to "
            "optimize: name a lower layer in model.layers, or load the model without quantization."
        )


def loss_of(group: ValueGroup, delta: Tensor, size: Tensor, settings: ValueSettings) -> tuple[Tensor, Tensor]:
    """The loss of each active fact, and whether every token of its target is the argmax in every context."""
    nll, divergence, hit = group.losses(delta)
    # The gradient of a norm is not defined at 0, where the first step starts: its square root is guarded.
    length = (delta.square().sum(1) + 1e-24).sqrt()
    return nll + settings.kl_factor * divergence + settings.weight_decay * length / size**2, hit
