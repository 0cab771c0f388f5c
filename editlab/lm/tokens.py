"""Tokenization with character offsets, to find the last token of a subject and the first token of a continuation.

Token positions are found by the offsets of a fast tokenizer, so no assumption about spaces, byte pairs or leading
special tokens is needed. Padding is done here and not by the tokenizer, so its ``padding_side`` has no effect.

Many models were trained only on texts that begin with a special token, such as ``<bos>``: :func:`beginning_of` returns
the tokens that a tokenizer puts before each text. :mod:`editlab.lm.joints` decides what stands between a prompt and its
continuation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlab.errors import UserError
from editlab.lm.joints import AUTO, boundary, join


@dataclass(frozen=True)
class Encoding:
    """Token ids of a text, and the span of characters of each token, which is (0, 0) for special tokens."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    beginning: int = 0
    """number of special tokens that the tokenizer put before the text"""

    def token_at(self, end: int) -> int:
        """Return the index of the last token that covers the character before ``end`` (a letter may be several tokens).

        Raises:
            UserError: No token covers it, because the tokenizer dropped the character.
        """
        for index in range(len(self.offsets) - 1, -1, -1):
            start, stop = self.offsets[index]
            if start < end <= stop:
                return index
        raise UserError(f"The tokenizer gives no token for character {end - 1} of the text: use another subject.")

    def first_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after ``position``, or the number of tokens."""
        for index, (_, stop) in enumerate(self.offsets):
            if stop > position:
                return index
        return len(self.ids)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 hex digest (64 characters) of everything that the ids of a fast tokenizer depend on."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the special tokens that the tokenizer puts before each text; () if it puts none."""
    out = tokenizer("a", return_special_tokens_mask=True)
    flags = out["special_tokens_mask"]
    return tuple(out["input_ids"][: next((i for i, flag in enumerate(flags) if not flag), 0)])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    """Tokenize ``text`` with the special tokens that the model expects before it, and none after it.

    A text that already begins with these tokens, as a rendered chat prompt does, does not get them twice.
    """
    out = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets = out["input_ids"], out["offset_mapping"]
    special = [
        bool(flag) and start == stop for flag, (start, stop) in zip(out["special_tokens_mask"], offsets, strict=True)
    ]
    length = len(special)
    while length and special[length - 1] and not all(special[:length]):
        length -= 1
    before = next((i for i, flag in enumerate(special) if not flag), 0)
    first = before if before and ids[before : 2 * before] == ids[:before] else 0
    spans = tuple((int(a), int(b)) for a, b in offsets[first:length])
    return Encoding(tuple(ids[first:length]), spans, before - first)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, joint: str = AUTO
) -> tuple[Encoding, int]:
    """Tokenize a prompt with its continuation, and return the index of the continuation's first token.

    A token that straddles the boundary belongs to the continuation.

    Args:
        tokenizer: a fast tokenizer.
        prompt: the text before.
        continuation: the text that follows.
        joint: what stands between them, one of :data:`~editlab.lm.joints.JOINTS`.

    Raises:
        UserError: The continuation has no token, or there is no token before it to predict it from.
    """
    encoding = encode(tokenizer, join(prompt, continuation, joint))
    start = encoding.first_after(boundary(prompt))
    if not continuation.strip() or start >= len(encoding.ids):
        raise UserError(f"The target {continuation!r} has no token: give it at least one letter.")
    if start == 0:
        raise UserError(f"There is no token before the target {continuation!r}: the prompt {prompt!r} is empty.")
    return encoding, start


def require_embeddings(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a model has an embedding for each token that an ordinary text may have.

    Special tokens without an embedding are accepted, because a text has them only where it spells them out: Gemma 3's
    tokenizer has one for images that its text models lack. :func:`require_embedded` refuses such a text.

    Args:
        tokenizer: a fast tokenizer.
        rows: number of the model's embeddings.

    Raises:
        UserError: An ordinary token has no embedding.
    """
    if len(tokenizer) <= rows:
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if any(index >= rows and index not in special for index in tokenizer.get_vocab().values()):
        message = _too_few(tokenizer, rows)
        raise UserError(message[0].upper() + message[1:])


def require_embedded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a model with ``rows`` embeddings has one for each of the token ids of a text.

    Raises:
        UserError: A token has no embedding.
    """
    if ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise UserError(f"A text has the token {token!r}, but {_too_few(tokenizer, rows)}")


def _too_few(tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    return (
        f"the tokenizer has {len(tokenizer)} tokens and the model embeddings for {rows}: call "
        f"model.resize_token_embeddings({len(tokenizer)}) and train the new ones, or give the model's own tokenizer."
    )


def pad(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to ``(ids, mask)``, long [n_rows, longest] on the CPU; padding has id 0 and mask 0."""
    width = max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.as_tensor(row, dtype=torch.long, device="cpu")
        mask[i, where] = 1
    return ids, mask


def common_start(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the longest common beginning of all rows."""
    first, last = min(rows), max(rows)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def by_beginning(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Return row indices in groups with common beginnings, each of at most ``budget`` tokens (and at least one row).

    A common beginning of rows in a group counts once. A padded group has at most four times as many tokens, because
    attention works on padded rows.
    """
    groups: list[list[int]] = []
    before: tuple[int, ...] = ()
    tokens = width = 0
    for row, index in sorted((tuple(row), i) for i, row in enumerate(rows)):
        new, wider = len(row) - len(common_start([before, row])), max(width, len(row))
        if groups and tokens + new <= budget and (len(groups[-1]) + 1) * wider <= 4 * budget:
            groups[-1].append(index)
            tokens, width = tokens + new, wider
        else:
            groups.append([index])
            tokens = width = len(row)
        before = row
    return groups


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices in groups of similar length, each of at most ``budget`` padded tokens (and at least one row)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first row of a group is its longest, so the padded size of the group is its rows times that length.
        if groups and (len(groups[-1]) + 1) * max(1, lengths[groups[-1][0]]) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
