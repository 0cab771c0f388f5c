"""Text generation: one loop for sampled texts, greedy continuations and answers to prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlab.errors import NonFiniteError, UserError
from editlab.lm.anatomy import context_length
from editlab.lm.placement import runs_on
from editlab.lm.tokens import encode, require_embedded

Pick = Callable[[Tensor], Tensor]
"""Function that chooses the next tokens: float32 logits [rows, vocabulary] -> token ids [rows]."""

ROWS = 64
"""Number of prompts that :func:`continue_greedily` continues at once."""


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
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, **keep)
        cache = out.past_key_values
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


def continue_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    stop: bool = False,
    tick: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths by the most likely token at each step.

    Prompts of equal length run together, so no padding is needed and each prompt's continuation is the same as if it
    were continued alone.

    Args:
        model: the model, in eval mode.
        prompts: token ids.
        new_tokens: as in :func:`continue_rows`.
        stop: as in :func:`continue_rows`.
        tick: called after each group of prompts with their number.

    Returns:
        The new token ids of each prompt, in the order of the prompts.
    """
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    found: list[list[int]] = [[] for _ in prompts]
    for _, members in sorted(by_length.items()):
        for start in range(0, len(members), ROWS):
            group = members[start : start + ROWS]
            for index, new in zip(
                group, continue_rows(model, [prompts[i] for i in group], new_tokens, stop=stop), strict=True
            ):
                found[index] = new
            if tick is not None:
                tick(len(group))
    return found


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the ids of the tokens that end a text; empty if the model has none."""
    settings = getattr(model, "generation_config", None) or model.config
    ends: Any = getattr(settings, "eos_token_id", None)
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


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
