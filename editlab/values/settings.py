"""Settings of how values v* are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from editlab.errors import UserError
from editlab.lm.matmul import MATMULS
from editlab.utils.validation import above_zero, decays, not_negative, one_of
from editlab.values.loss import KL_POSITIONS, PROMPT
from editlab.values.spread import RESIDUAL, SPREADS

SOURCES = (OPTIMIZE, GRADIENT) = ("optimize", "gradient")
"""Settings of ``values.source``."""

DEFAULT_LR = {OPTIMIZE: 1.4, GRADIENT: 2.5e-3}
"""Source -> its default step size, chosen on facts of the dev split with SmolLM2-135M."""

PUBLISHED_SEARCH: dict[str, Any] = {
    "steps": 25, "lr": 0.5, "lr_end": 1.0, "betas": (0.9, 0.999), "contexts_a_step": None,
}  # fmt: skip
"""The search of ROME's and MEMIT's codes: every step runs all contexts, with Adam's usual decay rates."""

ADDED_LATER = {
    "source": OPTIMIZE, "anchor_facts": 0, "kl_at": PROMPT, "spread": RESIDUAL, "contexts_a_step": None, "lr_end": 1.0,
    "betas": (0.9, 0.999),
}  # fmt: skip
"""Settings that older versions did not have -> what these versions did; see :meth:`ValueSettings.cache_key`."""

OF_ANY_SOURCE = ("source", "lr", "batch_tokens", "matmul")
"""Settings that are not of the search alone."""


@dataclass
class ValueSettings:
    """Settings of how values are found.

    The defaults were chosen by measurements on SmolLM2-135M; the presets in ``configs/models`` state their models' own.
    """

    source: str = OPTIMIZE
    """``optimize``: a search for each fact; or ``gradient``: one forward and one backward pass for each fact
    (:mod:`editlab.values.gradient`), of whose settings only ``lr``, ``batch_tokens`` and ``matmul`` exist."""
    steps: int = 22
    """Number of evaluations of the loss; the number of updates is one less."""
    lr: float | None = None
    """Step size of the search's first update (default: 1.4), or UltraEdit's eta for the gradient source (default:
    0.0025)."""
    weight_decay: float = 1e-3
    """Weight of ||delta|| / ||v0||^2."""
    kl_factor: float = 0.0625
    """Weight of the KL term."""
    clamp: float = 0.75
    """Radius of the ball around v0, as a fraction of ||v0||."""
    loss_threshold: float = 5e-2
    """Loss under which the optimization of a fact ends."""
    early_stop: int = 0
    """Number of consecutive evaluations with the target as the argmax in every context after which the optimization of
    a fact ends too (most-probable early stopping, Gupta et al. 2025, arXiv:2502.01636); 0 turns it off. It saves time
    and gives values closer to the original: edits generalize less to paraphrases, and do less harm."""
    reference: str = "current"
    """Weights that values are optimized on: ``current`` ones, or the ``original`` (unedited) ones, in which case the
    values are kept in the cache folder for later runs."""
    spread: str = RESIDUAL
    """How several layers share an edit (:mod:`editlab.values.spread`). ``residual``: a value at the highest layer; its
    residual is divided among the layers (MEMIT). ``each``: a value of its own for each layer (BLUE). ``forward``: a
    value at the lowest layer, and for the others what the model outputs with that value in place (FE)."""
    batch_tokens: int | None = None
    """Number of padded tokens that are optimized together as a group. It bounds memory and changes results only by
    rounding. Default: 512 on a CPU, whose caches hold no more; on GPUs up to 4096, as long as they fit into half of the
    memory that the weights leave free. A group that still does not fit is halved. Several ranks share the groups."""
    matmul: str = "auto"
    """Type of the matrix products above the site, for float32 weights: ``float32``; ``bfloat16``, which changes values
    by 2% of their norm on SmolLM2-135M, at the same loss; or ``auto``: bfloat16 on CPUs with instructions for it."""
    kl_at: str | None = None
    """Token of "{subject} is a" after which the KL term compares predictions: its last one (``prompt``), or the
    subject's last one (``subject``). Default: as ``model.conventions`` says, and ``prompt`` without them."""
    anchor_facts: int = 0
    """Number of the run's first facts whose values on the original weights give the norm that every value is rescaled
    to (NAS, :mod:`editlab.values.anchor`); 0: values are not rescaled. ``layers: auto`` tries layers without it."""
    contexts_a_step: int | None = 2
    """Number of contexts whose prompts each evaluation of the loss runs; the contexts take turns, in their order, and
    the loss that is compared with the threshold is the mean of each context's latest one. Null: all contexts."""
    lr_end: float = 0.05
    """Step size of the last update as a fraction of the first one's; it falls linearly from the one to the other."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's decay rates: of the mean of the gradients, and of the mean of their squares. Lower ones forget sooner."""

    def __post_init__(self) -> None:
        where = "model.values"
        one_of(where, SOURCES, source=self.source)
        above_zero(where, steps=self.steps, lr=self.lr, clamp=self.clamp, batch_tokens=self.batch_tokens)
        above_zero(where, contexts_a_step=self.contexts_a_step)
        weights = ("weight_decay", "kl_factor", "loss_threshold", "early_stop", "anchor_facts")
        not_negative(where, **{name: getattr(self, name) for name in weights})
        one_of(where, ("current", "original"), reference=self.reference)
        one_of(where, MATMULS, matmul=self.matmul)
        one_of(where, SPREADS, spread=self.spread)
        one_of(where, KL_POSITIONS, kl_at=self.kl_position)
        decays(where, lr_end=self.lr_end)
        self.betas = _two_rates(where, self.betas)
        if self.source == GRADIENT:
            self._require_no_search()

    def _require_no_search(self) -> None:
        """Refuses settings that only a search has.

        Raises:
            UserError: One of them is set.
        """
        for field in fields(self):
            unset = (field.default, ADDED_LATER.get(field.name))  # the editor replaces a kl_at of None by its meaning
            if field.name not in OF_ANY_SOURCE and getattr(self, field.name) not in unset:
                raise UserError(
                    f"model.values.{field.name} has no meaning for model.values.source gradient, which takes one step "
                    f"on the current weights: remove it, or set the source to {OPTIMIZE}."
                )

    @property
    def step_size(self) -> float:
        """The step size: ``lr``, or the source's default if that is None."""
        return DEFAULT_LR[self.source] if self.lr is None else self.lr

    @property
    def kl_position(self) -> str:
        """The token of the KL term: ``kl_at``, or ``prompt`` if that is None."""
        return PROMPT if self.kl_at is None else self.kl_at

    def step_size_of(self, update: int) -> float:
        """The step size of an update, the first one being number 0."""
        last = self.steps - 2  # one update less than evaluations of the loss
        return self.step_size * (1 + (self.lr_end - 1) * update / last if last > 0 else 1)

    def cache_key(self) -> dict[str, Any]:
        """All settings, for the key of a cache.

        A setting that older versions did not have is left out if it is what they did, so that their caches stay valid;
        for the same reason the only optimizer is named, of which they had two.
        """
        settings = {**asdict(self), "kl_at": self.kl_position}
        as_before = [name for name, value in ADDED_LATER.items() if settings[name] == value]
        return {"optimizer": "adam"} | {name: value for name, value in settings.items() if name not in as_before}


def _two_rates(where: str, betas: Sequence[float]) -> tuple[float, float]:
    """Adam's decay rates as a tuple, whatever kind of sequence a recipe gave.

    Raises:
        UserError: They are not two numbers from 0 to below 1.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        given = ", ".join(map(str, betas))
        raise UserError(f"{where}.betas is [{given}]: it must be two numbers that are at least 0 and below 1.")
    return (float(betas[0]), float(betas[1]))
