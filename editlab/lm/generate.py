"""Text generation: one loop for sampled texts, greedy continuations and answers to prompts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import NonFiniteError, UserError
from editlab.lm.anatomy import context_length
from editlab.lm.forward import cache_in, with_cache
from editlab.lm.joints import boundary
from editlab.lm.placement import runs_on
from editlab.lm.together import continue_together
from editlab.lm.tokens import Encoding, encode, require_embedded

Pick = Callable[[Tensor], Tensor]
"""Function that chooses the next tokens: float32 logits [rows, vocabulary] -> token ids [rows]."""

SENTENCE_END = re.compile(r"[.!?](?=\s)|[\u3002\uff01\uff1f]|\n")
"""The end of a sentence: a full stop, exclamation or question mark before white space, or a line break. The wide
Chinese and Japanese marks need no white space after them."""


def most_likely(logits: Tensor) -> Tensor:
    """Return the token with the highest logit of each row; logits [rows, vocabulary] -> ids [rows]."""
    return logits.argmax(1)


def drawn(logits: Tensor) -> Tensor:
    """Draw a token for each row from its softmax; logits [rows, vocabulary] -> ids [rows].

    The tokens are drawn by :func:`torch.multinomial` with the global generator of the logits' device.

    Raises:
        NonFiniteError: The logits are not finite; torch would fail, and on a GPU the process would end.
    """
    if not bool(logits.logsumexp(1).isfinite().all()):
        raise NonFiniteError(
            "The model's logits are not finite, so no text can be drawn from it: use a wider trainer.precision, or "
            "edit it less strongly."
        )
    return torch.multinomial(logits.softmax(1), 1).squeeze(1)


@torch.no_grad()
def continue_rows(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    pick: Pick = most_likely,
    *,
    stop: bool = False,
    never: Sequence[int] = (),
    tick: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """Generate new tokens after prompts of equal length, with a KV cache and one forward pass per token.

    The model's own generation settings (temperature, penalties, beams) are ignored.

    Args:
        model: the model, in eval mode.
        prompts: token ids; all prompts have the same length.
        new_tokens: number of tokens to generate for each prompt; with ``stop`` the largest number.
        pick: chooses each next token.
        stop: end a text at the model's end-of-text token, which is not part of the result. Otherwise such tokens are
            never generated.
        never: further tokens that are not generated if ``stop`` is off.
        tick: called after each step with the number of tokens that the step generated.

    Returns:
        The new token ids of each prompt, without the prompt.
    """
    device = runs_on(model.get_input_embeddings())
    ends = torch.tensor(sorted(end_tokens(model)), dtype=torch.long, device=device)
    banned = torch.tensor(sorted({*end_tokens(model), *never}), dtype=torch.long, device=device)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    fed = torch.tensor([list(prompt) for prompt in prompts], device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Any = None
    steps: list[Tensor] = []
    for _ in range(new_tokens):
        out = model(input_ids=fed, **with_cache(model, cache), **keep)
        cache = cache_in(out)
        logits = out.logits[:, -1].to(device=device, dtype=torch.float32, copy=True)
        if not stop:
            logits[:, banned] = -torch.inf
        token = pick(logits)
        steps.append(token)
        if tick is not None:
            tick(len(prompts))
        if stop and bool((ended := ended | torch.isin(token, ends)).all()):
            break
        fed = token[:, None]
    if not steps:
        return [[] for _ in prompts]
    rows: list[list[int]] = torch.stack(steps, 1).tolist()
    return [_until(row, ends.tolist()) for row in rows] if stop else rows


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first end-of-text token."""
    return row[: next((index for index, token in enumerate(row) if token in ends), len(row))]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the ids of the tokens that end a text; empty if the model has none."""
    settings = getattr(model, "generation_config", None) or model.config
    ends: Any = getattr(settings, "eos_token_id", None)
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


class Speaker(Protocol):
    """The parts of a :class:`~editlab.lm.language_model.LanguageModel` that continuing a text needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> Encoding:
        """Tokenize a text, with the special tokens that the model expects before it."""


# ---- texts --------------------------------------------------------------------------------------------------------


def greedy_texts(
    lm: Speaker,
    prompts: Sequence[str],
    max_new_tokens: int,
    done: Callable[[int, str], bool],
    tick: Callable[[int], Any] | None = None,
) -> list[str]:
    """Continue prompts greedily, each until the model ends its text or until its text is enough.

    Args:
        lm: the model.
        prompts: the texts to continue. One space at the end of a prompt is left to the continuation, because most
            tokenizers have one token for a space and the word after it.
        max_new_tokens: the largest number of new tokens.
        done: called with the index of a prompt and its continuation so far; returns whether that is enough.
        tick: called with the number of prompts that were continued together.

    Returns:
        For each prompt its continuation as text, without special tokens.

    Raises:
        UserError: A prompt is empty, or the model has no embedding for one of its tokens.
    """
    for prompt in prompts:
        require_words(prompt)
    ids = [lm.encode(prompt[: boundary(prompt)]).ids for prompt in prompts]
    special = set(lm.tokenizer.all_special_ids)

    def text(index: int, new: Sequence[int]) -> str:
        return continued(lm.tokenizer, ids[index], _until(list(new), list(special))).rstrip("\ufffd")

    def ended(index: int, new: list[int]) -> bool:
        return new[-1] in special or done(index, text(index, new))

    longest = context_length(lm.model)
    rooms = [max_new_tokens if longest is None else max(0, min(max_new_tokens, longest - len(row))) for row in ids]
    new = continue_together(lm.model, ids, rooms, end_tokens(lm.model), ended, tick)
    return [text(index, row) for index, row in enumerate(new)]


def greedy_continuations(
    lm: Speaker,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    tick: Callable[[int], Any] | None = None,
) -> list[str]:
    """Return what the model says after each prompt: its most likely tokens, until it ends its first sentence.

    The model is told neither the length nor the beginning of an answer. A text ends at the model's own end token, at
    the end of a sentence (:func:`first_sentence`), or after ``max_new_tokens`` tokens. Equal prompts are run once.

    Args:
        lm: the model, with its current weights.
        prompts: the texts to continue.
        max_new_tokens: the largest number of new tokens.
        tick: called with the number of distinct prompts that were continued together.

    Returns:
        For each prompt the first sentence of its continuation, without white space around it; "" if the model ends its
        text at once.

    Raises:
        UserError: As :func:`greedy_texts`.
    """
    distinct = list(dict.fromkeys(prompts))

    def ended(index: int, text: str) -> bool:
        return SENTENCE_END.search(text.lstrip()) is not None

    texts = greedy_texts(lm, distinct, max_new_tokens, ended, tick)
    found = {prompt: first_sentence(text) for prompt, text in zip(distinct, texts, strict=True)}
    return [found[prompt] for prompt in prompts]


def first_sentence(text: str) -> str:
    """Return the first sentence of a text with its final mark, without white space around it.

    >>> first_sentence(" Paris. It lies on the Seine.")
    'Paris.'
    >>> first_sentence("3.5 million people" + chr(10) + "The")
    '3.5 million people'
    """
    text = text.lstrip()
    end = SENTENCE_END.search(text)
    return (text[: end.end()] if end else text).strip()


# ---- answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt."""

    continuation: str
    """greedy continuation, as text"""
    next: tuple[tuple[str, float], ...]
    """most likely next tokens and their probabilities, in descending order"""


def require_words(prompt: str) -> None:
    """Check that a prompt is not empty.

    Raises:
        UserError: The prompt is empty.
    """
    if not prompt.strip():
        raise UserError("A prompt is empty: give each at least one word.")


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, top: int
) -> Answer:
    """Continue a prompt greedily, until the model ends the text or ``new_tokens`` tokens are generated.

    Args:
        model: the model, in eval mode.
        tokenizer: its fast tokenizer.
        prompt: the text; the special tokens that the model expects before it are added.
        new_tokens: the largest number of tokens of the continuation, 0 or more.
        top: number of next tokens in the answer; fewer if the vocabulary is smaller.

    Raises:
        UserError: The prompt is empty, too long for the model, or has a token that the model has no embedding for.
    """
    require_words(prompt)
    ids = list(encode(tokenizer, prompt).ids)
    require_embedded(ids, tokenizer, len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    longest = context_length(model)
    if longest is not None and len(ids) + new_tokens > longest:
        raise UserError(
            f"The prompt {prompt[:40]!r} has {len(ids)} tokens, and with {new_tokens} new ones the model takes "
            f"{longest}: shorten it, or lower --new_tokens."
        )
    first: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        if not first:
            first.append(logits[0].softmax(0).cpu())
        return most_likely(logits)

    (new,) = continue_rows(model, [ids], max(1, new_tokens), pick, stop=True)
    best = first[0].topk(min(top, len(first[0])))
    tokens = [continued(tokenizer, ids, [token]) for token in best.indices.tolist()]
    return Answer(
        continued(tokenizer, ids, new[:new_tokens]), tuple(zip(tokens, best.values.tolist(), strict=True))
    )  # fmt: skip


def continued(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that ``new`` adds after ``ids``; some tokenizers drop the space before a token decoded alone."""
    before, after = (
        str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for some in (list(ids), [*ids, *new])
    )
    return after.removeprefix(before)
