"""Targets from one gradient: a forward and a backward pass for each fact, and no search (UltraEdit, arXiv:2505.14679).

With h the key of a fact (the input of the edited layer) and g the gradient of its loss with respect to the layer's
output, both at the same token, the features z = [h, g] are normalized by the mean mu and the standard deviation sigma
of all facts so far, those of the batch included, and a step is taken against the normalized gradient::

    z^_i = (z_i - mu) / (sigma + eps)             mu, sigma: of every feature, over the whole run ("lifelong")
    v_i  = - eta ||h^_i||^2 g^_i                  the residual of fact i
    delta = V K^T (K K^T + I)^-1                  with the keys K as they are: metric I, slack 1 in the closed form

The loss is the mean of -log p(token) over the new target's tokens after the bare prompt. In the paper the features are
read where tokens of the answer are predicted, so that no subject is needed; here they are read at the subject's last
token, as for every other source, and ``data.subject: last_token`` makes that the prompt's last one. With several edited
layers the step at the highest one is divided among them like any value.

The equations are those of the authors' code. Its sum of squares counts the unbiased variance of a batch of n facts n
times instead of n - 1 times; here sigma is the standard deviation of all facts so far, with count - 1 below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from editlab.data.fact import Fact
from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import by_halves
from editlab.lm.tokens import by_length
from editlab.values.loss import ValueGroup, rows_of
from editlab.values.optimize import products_above, require_effect, tokens_together
from editlab.values.settings import ValueSettings

EPSILON = torch.finfo(torch.float32).eps
"""eps of the normalization: that of the authors' code, whose features are float32."""


@dataclass(frozen=True)
class RunningMoments:
    """Mean and standard deviation of features over all rows so far, float64; updates return a new object.

    >>> moments = RunningMoments.empty(1).plus(torch.tensor([[1.0], [3.0]])).plus(torch.tensor([[8.0]]))
    >>> moments.count, moments.mean.item(), moments.squares.item()  # 9 + 1 + 16
    (3, 4.0, 26.0)
    """

    count: int
    """number of rows"""
    mean: Tensor
    """[features]"""
    squares: Tensor
    """[features]: sum of the squared differences from the mean"""

    @classmethod
    def empty(cls, features: int) -> RunningMoments:
        """The moments of no rows."""
        zero = torch.zeros(features, dtype=torch.float64)
        return cls(0, zero, zero)

    def plus(self, rows: Tensor) -> RunningMoments:
        """The moments with further rows [n, features] (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        rows = rows.double()
        n, count = len(rows), self.count + len(rows)
        own = rows.mean(0)
        shift = own - self.mean
        squares = (rows - own).square().sum(0)
        return RunningMoments(
            count, self.mean + shift * (n / count), self.squares + squares + shift.square() * (self.count * n / count)
        )

    def normalized(self, rows: Tensor) -> Tensor:
        """``(z - mean) / (deviation + eps)`` of rows z [n, features], float64.

        Raises:
            UserError: There are fewer than two rows so far, so that no feature has a deviation.
        """
        if self.count < 2:
            raise UserError(
                "model.values.source gradient needs the standard deviation of keys and gradients, and the run has one "
                "fact so far, which has none: let the first batch that is kept have 2 facts or more (data.batch_size)."
            )
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows.double() - self.mean) / (deviation + EPSILON)


def steps_of(keys: Tensor, gradients: Tensor, moments: RunningMoments, eta: float) -> Tensor:
    """The residuals ``- eta ||h^||^2 g^`` of facts, float64 [n, d_v].

    Args:
        keys: [n, d_k].
        gradients: [n, d_v].
        moments: of the concatenated features, with these facts among them.
        eta: step size.
    """
    key, gradient = moments.normalized(torch.cat([keys.double(), gradients.double()], 1)).split(
        [keys.shape[1], gradients.shape[1]], 1
    )
    return -eta * key.square().sum(1, keepdim=True) * gradient


def read_gradients(
    lm: LanguageModel,
    facts: Sequence[Fact],
    site: Site,
    settings: ValueSettings,
    progress: Callable[[int], object] | None = None,
    reserved: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, gradients of the loss with respect to the site's output, and that output, at the subjects' last tokens.

    Several ranks share the facts.

    Args:
        lm: the model, with the weights as they are.
        facts: the facts.
        site: the site.
        settings: ``matmul`` and ``batch_tokens`` are used.
        progress: called after each group with its number of facts.
        reserved: as for :func:`~editlab.values.optimize.tokens_together`.

    Returns:
        float32 [n, d_k], [n, d_v] and [n, d_v].

    Raises:
        UserError: A target begins within the subject's last token, or no target depends on the site.
        EditLabError: A gradient is not finite.
    """
    rows = [rows_of(lm, i, fact, [""])[:1] for i, fact in enumerate(facts)]

    def read(group: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        together = ValueGroup(lm, site, [rows[i] for i in group], with_keys=True)
        delta = torch.zeros_like(together.origin, requires_grad=True)
        (gradient,) = torch.autograd.grad(together.losses(delta).nll.sum(), delta)
        require_effect(bool(gradient.any()), site)
        if progress is not None:
            progress(len(group))
        return list(zip(together.keys.float().cpu(), gradient.cpu(), together.origin.cpu(), strict=True))

    with products_above(lm, site, settings):
        tokens = settings.batch_tokens or tokens_together(lm, site, reserved)
        found = ranks.each(by_length([len(row.tail) for (row,) in rows], tokens), partial(by_halves, read))
    keys, gradients, origins = (torch.stack(some) for some in zip(*found, strict=True))
    if not bool(torch.isfinite(gradients).all()):
        bad = facts[int((~torch.isfinite(gradients)).any(1).nonzero()[0])]
        raise EditLabError(f"The gradient of {bad.question!r} is not finite: use a wider trainer.precision.")
    return keys, gradients, origins
