"""The objective of an adjustment: learn the edits and keep everything else.

This module knows neither the callback nor PEFT, only a model and rows of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.lm.text import cut, read_file, read_ids, scored, self_text, text_of
from editlab.training.rows import Row, logits_of
from editlab.utils.validation import not_negative

LOSSES = {"edits": 1.0, "before": 2.0, "unedited": 0.0}
"""Parts of the loss -> their default weights."""
WINDOW = 32
"""Tokens in a window of the text whose likelihood should not change."""


def prompt_rows(lm: LanguageModel, facts: Sequence[Fact]) -> list[Row]:
    """The questions of facts; the next-token distribution at their end counts."""
    encoded = [tuple(lm.encode(fact.question).ids) for fact in facts]
    return [Row(ids, (len(ids) - 1,), (-1,)) for ids in encoded]


def short_windows(lm: LanguageModel, text: str, count: int, seed: int) -> list[list[int]]:
    """Windows of a text file, or of text sampled from the model with its present weights (``self``).

    Sampled text is kept in the cache folder, as a resumed run and every other run of the same model need it again.

    Args:
        lm: the model.
        text: a path, or ``self``.
        count: number of windows.
        seed: seed of the sampling.

    Raises:
        UserError: The file cannot be read, or is too short.
    """
    if text == "self":
        windows = self_text(lm, count * WINDOW, seed, "Sampling text")
        flat = [token for window in windows for token in text_of(lm, window)]
    else:
        flat = read_ids(lm, read_file(text), count * WINDOW)
    return cut(lm, flat, WINDOW)


def text_rows(lm: LanguageModel, windows: Sequence[Sequence[int]]) -> list[Row]:
    """Windows of text, as :func:`editlab.lm.text.cut` makes them; the tokens that can be scored count."""
    indices = [scored(lm, window) for window in windows]
    return [
        Row(tuple(w[:-1]), tuple(i - 1 for i in some), tuple(w[i] for i in some))
        for w, some in zip(windows, indices, strict=True)
        if some
    ]


@torch.no_grad()
def distributions(lm: LanguageModel, rows: Sequence[Row], size: int = 16) -> list[Tensor]:
    """Log-probabilities at each row's positions with the weights as they are, float32 [positions, vocabulary] each."""
    found: list[Tensor] = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        found += logits_of(lm, some).log_softmax(1).split([len(row.indices) for row in some])
    return found


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats, the mean over positions; ``reference`` holds log-probabilities."""
    return nn.functional.kl_div(logits.log_softmax(1), reference, reduction="batchmean", log_target=True)


def loss_weights(where: str, weights: dict[str, float]) -> dict[str, float]:
    """Adds the default weights of :data:`LOSSES` to those given; ``where`` names the setting in errors.

    Raises:
        UserError: A part is unknown, or a weight is negative or not a number.
    """
    if set(weights) - set(LOSSES):
        raise UserError(f"{where} is {weights}: give {', '.join(LOSSES)}, or some of them.")
    not_negative(where, **weights)
    return {**LOSSES, **weights}


@dataclass
class Objective:
    """The loss of an adjustment: cross-entropy of edits, and divergence from earlier distributions elsewhere.

    ``loss = w_edits CE(edits) + w_before KL(before || now) + w_unedited KL(unedited || now)``
    """

    edits: Sequence[Row]
    other_rows: Sequence[Row]
    before: Sequence[Tensor]
    """distributions at :attr:`other_rows` before the adjustment; unused if their weight is 0"""
    unedited: Sequence[Tensor]
    """distributions of the unedited model there; unused if their weight is 0"""
    weights: dict[str, float]

    def loss(self, lm: LanguageModel, edits: Sequence[int], other_rows: Sequence[int]) -> dict[str, Tensor]:
        """The unweighted parts of the loss on the edit rows and other rows with these indices."""
        parts = {}
        if edits:
            rows = [self.edits[i] for i in edits]
            following = torch.tensor([token for row in rows for token in row.following], device=lm.device)
            parts["edits"] = nn.functional.cross_entropy(logits_of(lm, rows), following)
        references = {"before": self.before, "unedited": self.unedited}
        references = {name: reference for name, reference in references.items() if self.weights[name] > 0}
        if references and other_rows:
            logits = logits_of(lm, [self.other_rows[i] for i in other_rows])
            for name, reference in references.items():
                parts[name] = divergence(torch.cat([reference[i] for i in other_rows]), logits)
        return parts

    def gradients(
        self, lm: LanguageModel, edits: Sequence[int], other_rows: Sequence[int], pieces: int = 1
    ) -> dict[str, float]:
        """Adds the gradients of the total to those of the parameters, and returns the parts of the loss.

        Args:
            lm: the model.
            edits: indices of edit rows.
            other_rows: indices of other rows.
            pieces: number of pieces in which the rows go through the model, one after the other. Each piece's loss is
                weighted by its fraction of the positions, so the gradients are the same up to rounding.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        found: dict[str, float] = {}
        for rows, chosen, of_edits in ((self.edits, edits, True), (self.other_rows, other_rows, False)):
            whole = sum(len(rows[i].indices) for i in chosen)
            for piece in range(pieces):
                some = chosen[piece::pieces]
                fraction = sum(len(rows[i].indices) for i in some) / whole if some else 0.0
                if not fraction:
                    continue
                with torch.enable_grad():
                    parts = self.loss(lm, some, []) if of_edits else self.loss(lm, [], some)
                    loss = self.total(parts) * fraction
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss is {float(loss.detach())}")
                if loss.requires_grad:
                    loss.backward()
                for name, part in parts.items():
                    found[name] = found.get(name, 0.0) + fraction * float(part.detach())
        return found

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the parts."""
        return sum((self.weights[name] * part for name, part in parts.items()), torch.zeros(()))
