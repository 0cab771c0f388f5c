"""What a model says to a prompt: its greedy continuation, and the likeliest next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.anatomy import context_length
from editlab.lm.tokens import encode


@dataclass(frozen=True)
class Answer:
    """Of one model to one prompt."""

    continuation: str
    next: tuple[tuple[str, float], ...]
    """likeliest next tokens, the best first, and their probabilities"""


def require_words(prompt: str) -> None:
    """Refuses a prompt with nothing in it.

    Raises:
        UserError: It is empty.
    """
    if not prompt.strip():
        raise UserError("A prompt is empty: give each at least one word.")


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, top: int
) -> Answer:
    """Continues a prompt by the likeliest token each time, until the text ends or ``new_tokens`` are there.

    Settings of the model's own for generating (temperature, penalties) play no part.

    Args:
        model: in eval mode.
        tokenizer: its fast tokenizer.
        prompt: the text as it stands, special tokens put before it as the model expects.
        new_tokens: at most so many; 0 or more.
        top: so many next tokens, and no more than there are.

    Raises:
        UserError: The prompt is empty, or too long for the model.
    """
    require_words(prompt)
    ids = list(encode(tokenizer, prompt).ids)
    longest = context_length(model)
    if longest is not None and len(ids) + new_tokens > longest:
        raise UserError(
            f"The prompt {prompt[:40]!r} has {len(ids)} tokens, and with {new_tokens} new ones the model takes "
            f"{longest}: shorten it, or lower --new_tokens."
        )
    new, probabilities = _continue(model, ids, new_tokens)
    best = probabilities.topk(min(top, len(probabilities)))
    tokens = [continued(tokenizer, ids, [token]) for token in best.indices.tolist()]
    return Answer(continued(tokenizer, ids, new), tuple(zip(tokens, best.values.tolist(), strict=True)))


@torch.no_grad()
def _continue(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """New ids, without the one that ends the text, and the probabilities [vocabulary] of the first."""
    ends = _ends(model)
    fed, past, first = torch.tensor([list(ids)], device=model.device), None, None
    new: list[int] = []
    while first is None or len(new) < new_tokens:
        out = model(input_ids=fed, past_key_values=past, use_cache=True)
        logits, past = out.logits[0, -1].float(), out.past_key_values
        first = logits.softmax(0).cpu() if first is None else first
        token = int(logits.argmax())
        if token in ends or not new_tokens:
            break
        new.append(token)
        fed = torch.tensor([[token]], device=model.device)
    return new, first


def _ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text."""
    settings = getattr(model, "generation_config", None) or model.config
    ends: Any = getattr(settings, "eos_token_id", None)
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def continued(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], new: Sequence[int]) -> str:
    """The text that ``new`` adds after ``ids``; some tokenizers drop the space before a token that stands alone."""
    before, after = (
        str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for some in (list(ids), [*ids, *new])
    )
    return after.removeprefix(before)
