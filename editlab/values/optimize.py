"""Values v*: what the edited layer should give at a subject's last token so that the new target follows.

A vector is added to the site's output at that token and optimized by Adam so that the target becomes likely in the
bare prompt and in a few contexts, with a KL term that keeps "{subject} is a" as it was, weight decay, and a ball
around the original (ROME section 3.1, arXiv:2202.05262; MEMIT section 4.2, arXiv:2210.07229)::

    loss = mean over contexts, tokens (-log p(target)) + kl_factor * KL(edited || initial)
           + weight_decay * ||delta|| / ||v0||^2,          ||delta|| <= clamp * ||v0||

All facts of a batch are optimized at once, one row of the vector each (:mod:`editlab.values.loss` has what runs at
each step). Facts whose loss is under the threshold leave the batch.
"""

from __future__ import annotations

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
from editlab.lm.matmul import MATMULS, products
from editlab.lm.memory import by_halves, spare_gpu_memory
from editlab.lm.tokens import by_length
from editlab.utils.validation import above_zero, not_negative, one_of
from editlab.values.loss import ValueGroup, rows_of

DEFAULT_LR = {"adam": 0.5, "gradient": 0.06}
"""Optimizer -> its step size on SmolLM2-135M."""

FEWEST_TOKENS = 512
"""Padded tokens optimized together, unless there is room and use for more."""

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
    early_stop: int = 0
    """A fact is done as well whose target has been the likeliest continuation in every context for so many evaluations
    in a row (the most-probable early stopping of Gupta et al. 2025, arXiv:2502.01636); 0 goes on to the threshold.
    Values are found sooner and lie closer to the original: edits generalize less to paraphrases, and harm less."""
    reference: str = "current"
    """``current``: values are found on the weights as they are; ``original``: on the unedited ones, once for all runs
    (they are kept in the cache folder)."""
    batch_tokens: int | None = None
    """Padded tokens optimized together. It bounds memory and changes results only by rounding. Where not given: 512 on
    a CPU, which larger groups outgrow the caches of; on GPUs up to 4096, as far as half of what the weights leave
    holds them. A group that does not fit all the same is halved. Groups are what several ranks share."""
    matmul: str = "auto"
    """``float32``; ``bfloat16``: matrix products above the site, which rounds values (by 2% of their norm
    on SmolLM2-135M, at the same loss); ``auto``: bfloat16 on CPUs with instructions for it. For float32 weights."""

    def __post_init__(self) -> None:
        where = "model.values"
        one_of(where, DEFAULT_LR, optimizer=self.optimizer)
        above_zero(where, steps=self.steps, lr=self.lr, clamp=self.clamp, batch_tokens=self.batch_tokens)
        weights = ("weight_decay", "kl_factor", "loss_threshold", "early_stop")
        not_negative(where, **{name: getattr(self, name) for name in weights})
        one_of(where, ("current", "original"), reference=self.reference)
        one_of(where, MATMULS, matmul=self.matmul)

    @property
    def step_size(self) -> float:
        """``lr``, or the optimizer's own where none is given."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr


@dataclass
class Values:
    """Targets of some facts, in their order."""

    target: Tensor
    """float32 [n, d_v]: what the site should give at the subject's last token of the bare prompt"""
    loss: Tensor
    """float32 [n]: the loss when the fact was done"""
    steps: Tensor
    """long [n]: evaluations of the loss that the fact took part in"""


def optimize_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    contexts: Sequence[str],
    settings: ValueSettings,
    progress: Callable[[int], object] | None = None,
    reserved: int = 0,
) -> Values:
    """Values of all facts, on the weights as they are; several ranks share the work.

    Args:
        lm: the model.
        facts: the facts; their order does not matter to the result beyond rounding.
        site: where the vector is added.
        contexts: prefixes, the empty one first.
        settings: hyper-parameters.
        progress: called with the number of facts each time some are done.
        reserved: as of :func:`tokens_together`.

    Raises:
        UserError: where a target begins within the subject's last token, or no target depends on the site.
        EditLabError: where a loss is not finite.
    """
    rows = [rows_of(lm, i, fact, contexts) for i, fact in enumerate(facts)]
    padded = [max(len(r.tail) for r in some) * len(some) for some in rows]
    d = lm.anatomy.value_size(site.layer)
    values = Values(torch.zeros(len(facts), d), torch.zeros(len(facts)), torch.zeros(len(facts), dtype=torch.long))
    left = len(facts)

    def optimize(group: Sequence[int]) -> list[tuple[Tensor, ...]]:
        nonlocal left
        target, loss, steps = _optimize(ValueGroup(lm, site, [rows[i] for i in group]), settings)
        left -= len(group)
        if progress is not None:
            progress(len(group))
        return list(zip(target.cpu(), loss.cpu(), steps.cpu(), strict=True))

    with _products_above(lm, site, settings):
        groups = by_length(padded, settings.batch_tokens or tokens_together(lm, site, reserved))
        found = ranks.each(groups, partial(by_halves, optimize))
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


def tokens_together(lm: LanguageModel, site: Site, reserved: int = 0) -> int:
    """Padded tokens that are optimized together by default: see :attr:`ValueSettings.batch_tokens`.

    Args:
        lm: the model.
        site: where the vector is added.
        reserved: bytes of what else stays on the model's devices, such as the metrics' factors.
    """
    room = spare_gpu_memory(lm.model, reserved)
    if room is None:
        return FEWEST_TOKENS
    # What the backward pass keeps of a token in a block: about ten states of the stream's width, four of the MLP's.
    states = 10 * lm.anatomy.value_size(site.layer) + 4 * lm.anatomy.key_size(site.layer)
    above = len(lm.anatomy.blocks) - site.layer
    each = states * above * next(lm.model.parameters()).element_size()
    # Of its logits, at worst asked for at every token: in the model's type and in float32, and two gradients of these.
    each += 4 * 4 * lm.model.config.get_text_config(decoder=True).vocab_size
    return max(FEWEST_TOKENS, min(TOKENS_A_PASS, room // 2 // each))


def _products_above(lm: LanguageModel, site: Site, settings: ValueSettings) -> AbstractContextManager[None]:
    """Products as the settings want them above the site, the head's too; keys and v0 come from below, unrounded."""
    above = list(lm.anatomy.blocks)[site.layer + 1 :]
    return products(settings.matmul, above, lm.anatomy.edit_path, lm.device, lm.anatomy.head)


def _optimize(group: ValueGroup, settings: ValueSettings) -> tuple[Tensor, Tensor, Tensor]:
    """All facts of a group; returns targets [n, d_v], losses [n] and steps [n]."""
    origin = group.origin
    delta = torch.zeros_like(origin, requires_grad=True)
    size = origin.norm(dim=1)
    radius = settings.clamp * size
    normalized = settings.optimizer == "gradient"
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([delta], settings.step_size, momentum=MOMENTUM, dampening=MOMENTUM)
        if normalized
        else torch.optim.Adam([delta], settings.step_size)
    )
    done, final_loss = torch.zeros_like(origin), torch.zeros_like(size)
    steps = torch.zeros(len(origin), dtype=torch.long)
    # Which facts are left is kept on the CPU, and the host waits for the device once a step: to learn who leaves.
    active, active_there = torch.arange(len(origin)), torch.arange(len(origin), device=origin.device)
    hits_in_a_row = torch.zeros_like(active_there)
    reached: Tensor | None = None
    for step in range(settings.steps):
        every = len(active) == len(origin)
        loss, hits = _loss(
            group, delta if every else delta[active_there], size if every else size[active_there], settings
        )
        hits_in_a_row = torch.where(hits, hits_in_a_row + 1, 0)
        leaving_there = loss.detach() < settings.loss_threshold
        if settings.early_stop:
            leaving_there = leaving_there | (hits_in_a_row >= settings.early_stop)
        flags = leaving_there if reached is None else torch.cat([leaving_there, reached[None]])
        known = flags.cpu()
        if reached is not None:
            _require_effect(bool(known[-1]), group.site)
            reached = None
        leaving = known[: len(active)]
        if step == settings.steps - 1:
            leaving = torch.ones_like(leaving)
        if bool(leaving.any()):
            which, gone = (t.to(origin.device, non_blocking=True) for t in (leaving.nonzero()[:, 0], active[leaving]))
            done[gone], final_loss[gone] = delta.detach()[gone], loss.detach()[which]
            steps[active[leaving]] = step + 1
        if bool(leaving.all()):
            break
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        if step == 0:
            reached = gradient.any()
        if normalized:
            gradient = gradient * (size / gradient.norm(dim=1).clamp_min(1e-20))[:, None]
        delta.grad = gradient
        optimizer.step()
        with torch.no_grad():
            delta.mul_((radius / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None])
        if bool(leaving.any()):
            active = active[~leaving]
            stay, active_there = (t.to(origin.device, non_blocking=True) for t in ((~leaving).nonzero()[:, 0], active))
            hits_in_a_row = hits_in_a_row[stay]
            group.keep(~leaving)
    return origin + done, final_loss, steps


def _require_effect(reached: bool, site: Site) -> None:
    """Refuse a site whose gradient is 0 to the bit: above the last block, or below products that pass none on."""
    if not reached:
        raise UserError(
            f"What layer {site.layer} gives at a subject's last token reaches no target, so nothing can be learnt "
            "there: name a lower layer in model.layers, or load the model without quantization."
        )


def _loss(group: ValueGroup, delta: Tensor, size: Tensor, settings: ValueSettings) -> tuple[Tensor, Tensor]:
    """Of the facts that are left, each one's loss, and whether its target is the likeliest everywhere."""
    nll, divergence, said = group.surprise(delta)
    # The gradient of a norm is not defined at 0, where the first step starts: its square root is guarded.
    length = (delta.square().sum(1) + 1e-24).sqrt()
    return nll + settings.kl_factor * divergence + settings.weight_decay * length / size**2, said
