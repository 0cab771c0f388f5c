"""Breadth-first training on the facts of one batch: every epoch goes over all mini-batches (arXiv:2509.22072)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.errors import NonFiniteError, UserError
from editlab.lm.language_model import LanguageModel
from editlab.lm.matmul import products_above
from editlab.training.methods import TrainedMethod
from editlab.training.rows import Row, edit_rows, logits_of
from editlab.utils.progress import progress
from editlab.utils.rng import private_draws


@dataclass(frozen=True)
class Trained:
    """Result of a training."""

    updates: dict[int, Tensor]
    """layer -> the update of its weight, float32 [d_v, d_k]; the weights themselves are as before"""
    loss: float
    """mean loss of the facts in the last epoch, in nats per token, each measured before its mini-batch's step"""
    epochs: int
    """number of epochs, including one that ended the training by its loss"""


def train(
    method: TrainedMethod,
    lm: LanguageModel,
    layers: Sequence[int],
    facts: Sequence[Fact],
    weights: Sequence[float],
    step: int,
) -> Trained:
    """Trains updates of some layers on facts, with the weights as they are as the start.

    The order of the facts is drawn from the method's seed and ``step`` alone, so that a resumed run repeats it.

    Args:
        method: the method, with its settings.
        lm: the model; after the training its weights and modules are what they were.
        layers: numbers of the layers to train.
        facts: the facts, at least one.
        weights: weight of each fact's loss in the mean over its mini-batch.
        step: number of batches before this one.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
        UserError: The tokenizer has no end token, and the method trains one.
    """
    rows = edit_rows(lm, facts, [""], end_of_target(lm) if method.end_token else None)
    draw = random.Random(f"{method.seed}:{step}")
    mini_batches = -(-len(rows) // method.mini_batch)
    total = method.epochs * mini_batches
    mean, epoch = 0.0, 0
    with (
        method.trainee(lm, layers, step) as trainee,
        products_above(lm, max(layers), method.matmul, head=True),
        private_draws(1000 * method.seed + step),  # of dropout
        progress(total=total, desc="Training", unit="step") as bar,
    ):
        optimizer = torch.optim.Adam(trainee.parameters, lr=method.lr)
        for epoch in range(1, method.epochs + 1):
            losses: list[float] = []
            for indices in mini_batches_of(len(rows), method.mini_batch, draw):
                with torch.enable_grad():
                    each = losses_of(lm, [rows[i] for i in indices])
                    share = torch.tensor([weights[i] for i in indices]).to(each)
                    loss = (share * each).sum() / share.sum()
                losses += each.detach().tolist()
                _require_finite(loss.detach(), method, step, epoch)
                if float(loss.detach()) >= method.stop_loss:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    trainee.constrain()
                bar.update()
            mean = sum(losses) / len(losses)
            if mean < method.stop_loss:
                break
        updates = trainee.updates()
    for update in updates.values():
        _require_finite(update, method, step, epoch)
    return Trained(updates, mean, epoch)


def mini_batches_of(count: int, size: int, draw: random.Random) -> list[list[int]]:
    """The numbers below ``count`` in a new random order, ``size`` at a time; the last mini-batch may have fewer.

    >>> [sorted(sum(mini_batches_of(5, 2, random.Random(seed)), [])) for seed in (1, 2)]
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    """
    order = draw.sample(range(count), count)
    return [order[start : start + size] for start in range(0, count, size)]


def losses_of(lm: LanguageModel, rows: Sequence[Row]) -> Tensor:
    """Mean cross-entropy of each row's following tokens, in nats per token, float32 [rows], with gradients."""
    following = torch.tensor([token for row in rows for token in row.following], device=lm.device)
    each = nn.functional.cross_entropy(logits_of(lm, rows), following, reduction="none")
    return torch.stack([part.mean() for part in each.split([len(row.following) for row in rows])])


def end_of_target(lm: LanguageModel) -> int:
    """The id of the tokenizer's end token.

    Raises:
        UserError: It has none.
    """
    end = lm.tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(
            "The tokenizer has no end token, which is trained after each target: set model.method.end_token to false."
        )
    return end


def _require_finite(numbers: Tensor, method: TrainedMethod, step: int, epoch: int) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise NonFiniteError(
            f"The training of batch {step} gave numbers that are not finite in epoch {epoch}: lower model.method.lr, "
            f"which is {method.lr:g}."
        )
