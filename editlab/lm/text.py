"""Text corpora as token ids: files, hub data sets, and text that a model samples itself.

Text is read in windows. Every window begins with the special tokens with which the tokenizer begins a text
(:attr:`LanguageModel.beginning`), because models whose tokenizer adds such tokens are never trained without them. These
tokens are neither scored nor counted among keys: no edit is made at them, and their keys are unlike others.
:func:`cut` makes all windows, and :func:`scored` and :func:`text_of` tell which tokens of a window count.

Text that the model samples itself needs no download, and its second moments work as well as those of a corpus.
Sampling takes minutes, so the sample is stored in the cache folder; the sample of the built-in model ships with editlab
(:data:`SHIPPED`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError
from editlab.lm.fingerprint import architecture, fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.tokens import require_embedded, tokenizer_fingerprint
from editlab.utils.disk_cache import TENSORS, DiskCache, key_of
from editlab.utils.files import cache_dir, require_end
from editlab.utils.progress import progress

log = logging.getLogger(__name__)

SELF = "self"
"""Name of the text that the model samples itself."""
HUB = "hub:"
"""Prefix of a hub data set's name: ``hub:dataset[:config[:split]]``."""
WINDOW = 128
"""Tokens of text in a window; keys in the middle layers hardly depend on earlier tokens."""
SAMPLED_ROWS = 128
"""Windows that are sampled together; they share one random generator, so another number gives another text."""
_CHARACTERS_A_TOKEN = 12
"""Upper bound of the mean number of characters per token, for any text and tokenizer."""
_HUB_ROWS = 50_000


# ---- files and data sets ------------------------------------------------------------------------------------------


def read_file(path: str) -> str:
    """Return the content of a text file.

    Raises:
        UserError: The file does not exist, or is not UTF-8 text.
    """
    file = Path(path).expanduser()
    try:
        require_end(file, f"The text {path!r}")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"The text {path!r} does not exist: give a file, hub:<data set>, or self.") from error
    except (OSError, ValueError) as error:  # a ValueError is about the encoding, or a path with a null character
        raise UserError(f"The text {path!r} cannot be read as UTF-8 ({error}): give a text file.") from error


def read_hub(name: str) -> str:
    """Return the first texts of a hub data set, which have more tokens than any setting needs.

    Args:
        name: ``hub:dataset[:config[:split]]``; the data set must have a column ``text``.

    Raises:
        UserError: The package ``datasets`` is not installed, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("A hub data set needs the package datasets: pip install datasets.") from error
    source, config, split = [*name.split(":")[1:], "", ""][:3]
    try:
        rows = datasets.load_dataset(source, config or None, split=split or "train", streaming=True)
        return "\n".join(row["text"] for row in rows.take(_HUB_ROWS))
    except Exception as error:
        raise UserError(
            f"The data set {name!r} cannot be loaded ({type(error).__name__}): check its name and the network."
        ) from error


def first_ids(lm: LanguageModel, text: str, tokens: int) -> list[int]:
    """Return up to ``tokens`` token ids of a text, without special tokens before it.

    Raises:
        UserError: The model has no embedding for one of the tokens.
    """
    # Only the beginning of a large corpus is tokenized.
    beginning = text[: tokens * _CHARACTERS_A_TOKEN]
    ids = list(lm.tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"])
    own = len(lm.beginning) if tuple(ids[: len(lm.beginning)]) == lm.beginning else 0  # spelled out in the text
    ids = ids[own : own + tokens]
    require_embedded(ids, lm.tokenizer, lm.embeddings)
    return ids


def read_ids(lm: LanguageModel, text: str, tokens: int) -> list[int]:
    """Return the first ``tokens`` token ids of a text, without special tokens before it.

    Raises:
        UserError: The text has fewer tokens, or the model has no embedding for one of them.
    """
    ids = first_ids(lm, text, tokens)
    if len(ids) < tokens:
        raise UserError(f"The text has {len(ids)} tokens, and {tokens} are needed: lower the number of tokens.")
    return ids


def text_key(text: str, seed: int) -> str:
    """Return the identity of a text for a cache key: a file's digest, the seed of sampled text, or a data set's name.

    Raises:
        UserError: The file cannot be read.
    """
    if text == SELF:
        return f"{SELF}:{seed}:{WINDOW}"
    if text.startswith(HUB):
        return text
    return hashlib.sha256(read_file(text).encode()).hexdigest()


def read_windows(
    lm: LanguageModel, text: str, tokens: int, *, seed: int = 0, title: str = "", cache: bool = True
) -> list[list[int]]:
    """Return a text in windows, as :func:`cut` makes them.

    Args:
        lm: the model, which samples the text if ``text`` is ``self``.
        text: ``self``, a file, or ``hub:dataset[:config[:split]]``.
        tokens: number of tokens of text.
        seed: seed of the sampling.
        title: title of the progress bar while text is sampled.
        cache: store sampled text in the cache folder and reuse it.

    Raises:
        UserError: The text cannot be read or is too short.
    """
    if text == SELF:
        return self_text(lm, tokens, seed, title, cache)
    return cut(lm, read_ids(lm, read_hub(text) if text.startswith(HUB) else read_file(text), tokens))


def cut(lm: LanguageModel, ids: Sequence[int], size: int | None = None) -> list[list[int]]:
    """Divide the token ids of a text into windows, each of which begins as the model's tokenizer begins a text.

    Args:
        lm: the model.
        ids: token ids, without special tokens before them.
        size: tokens of text in a window, or fewer if the model takes fewer; default: :data:`WINDOW`. The last window
            may be shorter.

    Returns:
        The token ids of each window, with the special tokens before it.
    """
    size, before = window_size(lm, size), lm.beginning
    return [[*before, *ids[start : start + size]] for start in range(0, len(ids), size)]


def window_size(lm: LanguageModel, size: int | None = None) -> int:
    """Return the tokens of text in a window: ``size`` (default: :data:`WINDOW`), or as many as the model takes."""
    size = WINDOW if size is None else size
    return size if lm.longest is None else min(size, lm.longest - len(lm.beginning))


def text_of(lm: LanguageModel, window: Sequence[int]) -> Sequence[int]:
    """Return a window without the special tokens that it begins with."""
    return window[len(lm.beginning) :]


def scored(lm: LanguageModel, window: Sequence[int]) -> range:
    """Return the indices of a window's tokens that can be scored.

    Special tokens before the text are not scored; without any, the first token has no context to be predicted from.
    """
    return range(max(1, len(lm.beginning)), len(window))


def reading(lm: LanguageModel) -> dict[str, Any]:
    """Return how windows of text are read, as a part of cache keys; {} for windows of ordinary length that are bare."""
    if not lm.beginning and window_size(lm) == WINDOW:
        return {}
    return {"reading": [list(lm.beginning), window_size(lm)]}


# ---- text that the model samples itself ---------------------------------------------------------------------------


def self_text(lm: LanguageModel, tokens: int, seed: int, title: str, cache: bool = True) -> list[list[int]]:
    """Return the result of :func:`sample_text`, read from editlab's own files or the cache if it is there.

    Args:
        lm: the model.
        tokens: number of tokens.
        seed: seed of the sampling.
        title: title of the progress bar.
        cache: whether to use the cache folder; text that ships with editlab is used in either case.

    Raises:
        EditLabError: The text that ships with editlab is damaged.
    """
    shipped = ranks.on_first(partial(_shipped, lm, tokens, seed))
    if shipped is not None:
        return cut(lm, shipped)
    if not cache:
        return sample_text(lm, tokens, seed, title)
    key = key_of(
        model=model_key(fingerprint(lm.model), lm.model), tokenizer=tokenizer_fingerprint(lm.tokenizer), seed=seed,
        tokens=tokens, window=WINDOW, rows=SAMPLED_ROWS, device=lm.device.type, **reading(lm),
    )  # fmt: skip

    def sample() -> dict[str, Tensor]:
        windows = sample_text(lm, tokens, seed, title)
        return {"ids": torch.tensor([token for window in windows for token in text_of(lm, window)], dtype=torch.int32)}

    kept = DiskCache(cache_dir() / "texts", TENSORS).fetch(key, sample, ranks.on_first)
    return cut(lm, kept["ids"].tolist())


def sample_text(lm: LanguageModel, tokens: int, seed: int, title: str) -> list[list[int]]:
    """Sample windows of text from the model at temperature 1 without truncation. Ranks share the work.

    A window begins with the special tokens with which the model's tokenizer begins a text; without any, its first token
    is drawn evenly from the vocabulary.

    Args:
        lm: the model, with its current weights.
        tokens: number of tokens of text; the last window is shortened to fit.
        seed: seed of the sampling.
        title: title of the progress bar, which moves with each sampling step; no bar is shown if it is empty.

    Raises:
        NonFiniteError: The model's logits are not finite.
    """
    size = window_size(lm)
    count = -(-tokens // size)
    prompts = [list(lm.beginning)] * count if lm.beginning else [[first] for first in _ordinary(lm, count, seed)]
    passes = [range(start, min(start + SAMPLED_ROWS, count)) for start in range(0, count, SAMPLED_ROWS)]

    def new(some: Sequence[int]) -> int:
        """Return the number of tokens to sample in each window of a pass; the last window alone may need fewer."""
        return len(lm.beginning) + min(size, tokens - size * some[0]) - len(prompts[0])

    mine = sum(len(some) * new(some) for some in passes[ranks.number() :: ranks.count()])
    with progress(total=mine, desc=title, unit="token", disable=not title) as bar:
        windows = ranks.each(
            passes, lambda some: lm.sample([prompts[i] for i in some], new(some), seed + some[0], tick=bar.update)
        )
    windows[-1] = windows[-1][: len(lm.beginning) + tokens - size * (count - 1)]
    return windows


def _ordinary(lm: LanguageModel, count: int, seed: int) -> list[int]:
    """Draw ``count`` tokens evenly from those of the vocabulary that are not special."""
    generator = torch.Generator().manual_seed(seed)
    special = set(lm.tokenizer.all_special_ids)
    size = min(lm.embeddings, len(lm.tokenizer))
    ordinary = torch.tensor([i for i in range(size) if i not in special], device="cpu")
    drawn: list[int] = ordinary[torch.randint(len(ordinary), (count,), generator=generator, device="cpu")].tolist()
    return drawn


# ---- sampled text that ships with editlab -------------------------------------------------------------------------


@dataclass(frozen=True)
class ShippedText:
    """Text that was sampled once from a model by :func:`sample_text` and ships with editlab.

    The file is a safetensors file with ``ids``, uint16 [windows, WINDOW]; its header states how they were sampled.
    """

    file: Path
    weights: str
    """fingerprint of the model's weights (:func:`editlab.lm.fingerprint.fingerprint`)"""
    seed: int
    tokens: int
    sha256: str
    """digest of the ids as little-endian 16-bit numbers, row by row"""
    window: int = 128

    def ids(self) -> list[int]:
        """Return all token ids as one list.

        Raises:
            EditLabError: The file is missing, or its content does not match its digest.
        """
        try:
            with safetensors.safe_open(self.file, "np") as opened:
                ids = opened.get_tensor("ids")
        except (OSError, safetensors.SafetensorError) as error:
            raise EditLabError(f"{self.file} cannot be read ({error}): install editlab again.") from error
        if hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest() != self.sha256:
            raise EditLabError(f"{self.file} is damaged: install editlab again.")
        found: list[int] = ids.reshape(-1).tolist()
        return found

    def made_with(self) -> dict[str, Any]:
        """Return how the text was sampled: the model and its architecture, versions, and settings."""
        with safetensors.safe_open(self.file, "np") as opened:
            found: dict[str, Any] = json.loads(opened.metadata()["made_with"])
        return found


SHIPPED: tuple[ShippedText, ...] = (
    ShippedText(
        file=Path(__file__).parents[1] / "data" / "smollm2-135m.self.safetensors",
        weights="7a752e321723fc1613c5c2122b024a7b65b2a1ec78a864c3eee09bbe3cb552b9",
        seed=0,
        tokens=24576,
        sha256="79fe8f00403973c01d6e1a75990ed38ec1bd1deb1b38d464664ad3b0248184c0",
    ),
)
"""The text of the built-in model for the default settings of the second moments."""


def _shipped(lm: LanguageModel, tokens: int, seed: int) -> list[int] | None:
    """Return the ids of the text that ships for this model and these settings; None if there is none."""
    for text in SHIPPED:
        settings_agree = (text.tokens, text.seed, text.window) == (tokens, seed, WINDOW) and not reading(lm)
        if settings_agree and text.weights == fingerprint(lm.model):
            made, now = text.made_with()["architecture"], architecture(lm.model)
            # The entries differ between versions of transformers; the common ones must agree.
            if all(made[name] == now[name] for name in made.keys() & now.keys()):
                log.info(
                    "Using the text sampled from %s that ships with editlab",
                    text.file.name.removesuffix(".self.safetensors"),
                )
                return text.ids()
    return None
