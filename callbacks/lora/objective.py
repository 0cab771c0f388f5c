"""The objective of an adjustment: edits are learnt while the rest stays as it was; and what the guard looks at.

No callback and no PEFT here: a model, rows of tokens, and the parameters to train.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.errors import UserError
from editlab.evaluation.scoring import score_facts
from editlab.keys.moments import read_file, read_ids, sample_text
from editlab.lm.forward import logits_only_at
from editlab.lm.language_model import LanguageModel
from editlab.lm.packing import lay_out
from editlab.lm.prefix_cache import Past
from editlab.lm.tokens import encode, encode_pair
from editlab.utils.validation import not_negative

LOSSES = {"edits": 1.0, "before": 2.0, "unedited": 0.0}
"""What the parts of the loss weigh where nothing else is said."""
WINDOW = 32
"""Tokens in a window of the text that shall stay as likely as it was."""


class Row(NamedTuple):
    """Tokens, and the places whose next token matters."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    following: tuple[int, ...]
    """the token after each place"""


def edit_rows(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]) -> list[Row]:
    """Each fact's question in each context, up to the last token of its new target; the target's places matter."""
    rows = []
    for fact in facts:
        for context in contexts:
            encoding, start = encode_pair(lm.tokenizer, context + fact.question, fact.target_new)
            places = tuple(range(start - 1, len(encoding.ids) - 1))
            rows.append(Row(tuple(encoding.ids[:-1]), places, tuple(encoding.ids[start:])))
    return rows


def prompt_rows(lm: LanguageModel, facts: Sequence[Fact]) -> list[Row]:
    """The questions of facts; what would come next matters, and no answer is known."""
    encoded = [tuple(encode(lm.tokenizer, fact.question).ids) for fact in facts]
    return [Row(ids, (len(ids) - 1,), (-1,)) for ids in encoded]


def short_windows(lm: LanguageModel, text: str, count: int, seed: int) -> list[list[int]]:
    """So many windows of a text file, or of text sampled from the model with its weights as they are (``self``).

    Raises:
        UserError: where the file can not be read, or is too short.
    """
    if text == "self":
        flat = [token for window in sample_text(lm, count * WINDOW, seed, "Sampling text") for token in window]
    else:
        flat = read_ids(lm, read_file(text), count * WINDOW)
    return [flat[i : i + WINDOW] for i in range(0, len(flat), WINDOW)]


def text_rows(windows: Sequence[Sequence[int]]) -> list[Row]:
    """Windows of text; each token after the first matters."""
    return [Row(tuple(w[:-1]), tuple(range(len(w) - 1)), tuple(w[1:])) for w in windows if len(w) > 1]


def logits_of(lm: LanguageModel, rows: Sequence[Row]) -> Tensor:
    """Float32 logits at the places of the rows, one row after the other, [places, vocabulary]; gradients flow.

    Rows are packed where the model runs them so.
    """
    layout = lay_out(lm, [row.ids for row in rows], Past.none(len(rows)))
    index = torch.tensor([(r, place) for r, row in enumerate(rows) for place in row.places], device=lm.device)
    with logits_only_at(lm.anatomy.head, *layout.place(index[:, 0], index[:, 1])):
        logits: Tensor = layout.run().logits[0].float()
    return logits


@torch.no_grad()
def distributions(lm: LanguageModel, rows: Sequence[Row], size: int = 16) -> list[Tensor]:
    """Log-probabilities at each row's places with the weights as they are: float32 [places, vocabulary] a row."""
    found: list[Tensor] = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        found += logits_of(lm, some).log_softmax(1).split([len(row.places) for row in some])
    return found


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model), the mean over places, in nats; of log-probabilities [places, vocabulary]."""
    return nn.functional.kl_div(logits.log_softmax(1), reference, reduction="batchmean", log_target=True)


def loss_weights(where: str, weights: dict[str, float]) -> dict[str, float]:
    """A weight for each of :data:`LOSSES`; ``where`` names the setting in errors.

    Raises:
        UserError: for an unknown part, or a weight that is negative or no number.
    """
    if set(weights) - set(LOSSES):
        raise UserError(f"{where} is {weights}: give {', '.join(LOSSES)}, or some of them.")
    not_negative(where, **weights)
    return {**LOSSES, **weights}


@dataclass
class Objective:
    """What is trained on: cross-entropy of edits, and divergence from what the model said elsewhere.

    ``loss = w_edits CE(edits) + w_before KL(before || now) + w_unedited KL(unedited || now)``
    """

    edits: Sequence[Row]
    others: Sequence[Row]
    before: Sequence[Tensor]
    """what the model said on :attr:`others` before the adjustment; only looked at where it weighs anything"""
    unedited: Sequence[Tensor]
    """what the unedited model said there"""
    weights: dict[str, float]

    def loss(self, lm: LanguageModel, edits: Sequence[int], others: Sequence[int]) -> dict[str, Tensor]:
        """The parts of the loss, unweighted, on the named edit rows and other rows."""
        parts = {}
        if edits:
            rows = [self.edits[i] for i in edits]
            following = torch.tensor([token for row in rows for token in row.following], device=lm.device)
            parts["edits"] = nn.functional.cross_entropy(logits_of(lm, rows), following)
        asked = {"before": self.before, "unedited": self.unedited}
        asked = {name: said for name, said in asked.items() if self.weights[name] > 0}
        if asked and others:
            logits = logits_of(lm, [self.others[i] for i in others])
            for name, said in asked.items():
                parts[name] = divergence(torch.cat([said[i] for i in others]), logits)
        return parts

    def gradients(
        self, lm: LanguageModel, edits: Sequence[int], others: Sequence[int], pieces: int = 1
    ) -> dict[str, float]:
        """Add the gradients of the total to those of the parameters, and return the parts of the loss.

        Args:
            lm: the model.
            edits: indices of edit rows.
            others: indices of other rows.
            pieces: in how many pieces the rows go through the model, one after the other. Each is weighted by its
                fraction of the positions that matter, so the gradients are the same up to rounding.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        found: dict[str, float] = {}
        for rows, indices, first in ((self.edits, edits, True), (self.others, others, False)):
            whole = sum(len(rows[i].places) for i in indices)
            for piece in range(pieces):
                some = indices[piece::pieces]
                fraction = sum(len(rows[i].places) for i in some) / whole if some else 0.0
                if not fraction:
                    continue
                with torch.enable_grad():
                    parts = self.loss(lm, some, []) if first else self.loss(lm, [], some)
                    loss = self.total(parts) * fraction
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss is {float(loss.detach())}")
                if loss.requires_grad:
                    loss.backward()
                for name, part in parts.items():
                    found[name] = found.get(name, 0.0) + fraction * float(part.detach())
        return found

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return sum((self.weights[name] * part for name, part in parts.items()), torch.zeros(()))


def draw_edits(
    edits: Sequence[Fact], recent: Sequence[bool], replayed: int, probes: int, draw: random.Random
) -> tuple[list[Fact], list[Fact]]:
    """Edits to train on, and edits that the guard sets aside: up to ``probes``, at most a quarter, none of only one.

    Args:
        edits: that stand.
        recent: for each, whether it was made since the last adjustment; those are all trained on.
        replayed: of the others, how many are drawn to be trained on.
        probes: how many are set aside; 0 leaves all to be trained on.
        draw: what they are drawn by.
    """
    count = min(probes, -(-len(edits) // 4)) if len(edits) > 1 else 0
    aside = set(draw.sample(range(len(edits)), count))
    left = [(fact, new) for i, (fact, new) in enumerate(zip(edits, recent, strict=True)) if i not in aside]
    earlier = [fact for fact, new in left if not new]
    drawn = draw.sample(earlier, min(replayed, len(earlier)))
    return [fact for fact, new in left if new] + drawn, [edits[i] for i in sorted(aside)]


@dataclass(frozen=True)
class Health:
    """What the guard looks at."""

    edits: float | None
    """mean log-probability per token of edits' targets, in nats; None where none are set aside"""
    accuracy: float | None
    """share of edits whose targets are the argmax at every token; None where none are set aside"""
    text: float | None
    """mean negative log-probability per token of the texts, in nats; None where there are none"""
    ES: float | None = None
    """share of edits whose new target is likelier than the truth; None where no truth is known"""

    def numbers(self) -> dict[str, float]:
        """What was measured, by name; what is no number (a model that is beyond saying anything) is left out."""
        return {name: x for name, x in asdict(self).items() if x is not None and math.isfinite(x)}

    def worse_than(self, before: Health, tolerance: float) -> str:
        """What has become worse by more than ``tolerance`` nats per token, as a sentence; "" where nothing has."""
        if before.edits is not None and self.edits is not None and not self.edits >= before.edits - tolerance:
            return f"edits set aside went from {before.edits:.3f} to {self.edits:.3f} nats per token"
        if before.text is not None and self.text is not None and not self.text <= before.text + tolerance:
            return f"the text set aside went from {before.text:.3f} to {self.text:.3f} nats per token"
        return ""


def examine(lm: LanguageModel, facts: Sequence[Fact], texts: Sequence[Row]) -> Health:
    """The model on some edits and texts, with the weights as they are."""
    scores = score_facts(lm, facts, paraphrases=False, neighbors=0).edit if facts else None
    wanted = [list(zip(row.places, row.following, strict=True)) for row in texts]
    logps = lm.next_token_scores([row.ids for row in texts], wanted).logps
    text = float(-torch.cat(logps).mean()) if logps else None
    if scores is None:
        return Health(None, None, text)
    told = ~scores.logp_true.isnan()
    success = (scores.logp_new > scores.logp_true)[told].float()
    return Health(
        edits=float(scores.logp_new.mean()),
        accuracy=float(scores.hit_new.float().mean()),
        text=text,
        ES=float(success.mean()) if len(success) else None,
    )


@dataclass
class Adjustment:
    """What became of one."""

    before: Health
    after: Health | None = None
    losses: dict[str, float] = field(default_factory=dict)
    """parts of the loss at the end of the training"""
    share: float = 1.0
    """of what was learnt that is kept"""
    reason: str = ""
    """why it is dropped"""
    seconds: float = 0.0
