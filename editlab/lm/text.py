"""Text corpora as token ids: files, hub data sets, and text that a model samples itself.

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
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.utils.disk_cache import TENSORS, DiskCache, key_of
from editlab.utils.files import cache_dir, require_regular
from editlab.utils.progress import progress

log = logging.getLogger(__name__)

SELF = "self"
"""Name of the text that the model samples itself."""
HUB = "hub:"
"""Prefix of a hub data set's name: ``hub:dataset[:config[:split]]``."""
WINDOW = 128
"""Tokens in a window of text; keys in the middle layers hardly depend on earlier tokens."""
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
        require_regular(file, f"The text {path!r}")
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


def read_ids(lm: LanguageModel, text: str, tokens: int) -> list[int]:
    """Return the first ``tokens`` token ids of a text, without special tokens.

    Raises:
        UserError: The text has fewer tokens.
    """
    # Only the beginning of a large corpus is tokenized.
    beginning = text[: tokens * _CHARACTERS_A_TOKEN]
    ids = list(lm.tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"])[:tokens]
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
    """Return the token ids of a text in windows of :data:`WINDOW` tokens; the last one may be shorter.

    Args:
        lm: the model, which samples the text if ``text`` is ``self``.
        text: ``self``, a file, or ``hub:dataset[:config[:split]]``.
        tokens: number of tokens.
        seed: seed of the sampling.
        title: title of the progress bar while text is sampled.
        cache: store sampled text in the cache folder and reuse it.

    Raises:
        UserError: The text cannot be read or is too short.
    """
    if text == SELF:
        return self_text(lm, tokens, seed, title, cache)
    return cut(read_ids(lm, read_hub(text) if text.startswith(HUB) else read_file(text), tokens))


def cut(ids: Sequence[int]) -> list[list[int]]:
    """Divide token ids into windows of :data:`WINDOW` tokens; the last one may be shorter."""
    return [list(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]


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
        return cut(shipped)
    if not cache:
        return sample_text(lm, tokens, seed, title)
    key = key_of(
        model=model_key(fingerprint(lm.model), lm.model), tokenizer=tokenizer_fingerprint(lm.tokenizer), seed=seed,
        tokens=tokens, window=WINDOW, rows=SAMPLED_ROWS, device=lm.device.type,
    )  # fmt: skip

    def sample() -> dict[str, Tensor]:
        windows = sample_text(lm, tokens, seed, title)
        return {"ids": torch.tensor([token for window in windows for token in window], dtype=torch.int32)}

    kept = DiskCache(cache_dir() / "texts", TENSORS).fetch(key, sample, ranks.on_first)
    return cut(kept["ids"].tolist())


def sample_text(lm: LanguageModel, tokens: int, seed: int, title: str) -> list[list[int]]:
    """Sample windows of text from the model: a random first token, then temperature 1 without truncation.

    Ranks share the work.

    Args:
        lm: the model, with its current weights.
        tokens: number of tokens; the last window is shortened to fit.
        seed: seed of the sampling.
        title: title of the progress bar, which moves with each sampling step; no bar is shown if it is empty.

    Raises:
        NonFiniteError: The model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    special = set(lm.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(vocabulary, len(lm.tokenizer))) if i not in special], device="cpu")
    count = -(-tokens // WINDOW)
    firsts = ordinary[torch.randint(len(ordinary), (count,), generator=generator, device="cpu")].tolist()
    passes = [range(start, min(start + SAMPLED_ROWS, count)) for start in range(0, count, SAMPLED_ROWS)]
    mine = sum(map(len, passes[ranks.number() :: ranks.count()]))
    with progress(total=mine * (WINDOW - 1), desc=title, unit="token", disable=not title) as bar:
        windows = ranks.each(
            passes,
            lambda some: lm.sample([[firsts[i]] for i in some], WINDOW - 1, seed + some[0], tick=bar.update),
        )
    windows[-1] = windows[-1][: tokens - WINDOW * (count - 1)]
    return windows


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
        settings_agree = (text.tokens, text.seed, text.window) == (tokens, seed, WINDOW)
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
