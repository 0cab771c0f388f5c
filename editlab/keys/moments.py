"""Second moments C0 = E[k k^T] of keys over ordinary text: what an edit should leave alone.

Text is streamed in windows, sums are kept in float64, blocks above the highest layer asked for never run, several
ranks share the passes, and the result is cached under a fingerprint of the weights, the layers and the text.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from editlab.distributed import ranks
from editlab.errors import UserError
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.precision import has_float64, widened
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.solver.closed_form import Preservation
from editlab.utils.files import atomic_file, cache_dir, read_tensors
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, not_negative

log = logging.getLogger(__name__)

WINDOW = 128
"""Tokens a window of text; keys in the middle layers hardly see farther."""
ROWS = 32
"""Windows a forward pass."""
KEYS_A_FEATURE = 2
"""Keys for each feature before which moments are not asked whether they suffice."""
PROBED = 16
"""Windows whose keys they are asked by."""


@dataclass
class MomentSettings:
    """Which text the second moments are taken over, and how much of it."""

    text: str = "self"
    """``self`` (text that the model samples itself), a text file, or ``hub:dataset[:config[:split]]``."""
    tokens: int = 24576
    """Tokens of text, at most; the literature's hint is ten times d_k or more."""
    tolerance: float = 0.0
    """Reading stops where new keys are by less than this share longer, measured by the moments, than those that the
    moments are of (:func:`excess`); ten keys a feature come to 0.11 if keys were normal. 0 reads all tokens."""
    seed: int = 0
    """Seed of the sampling where ``text`` is ``self``."""
    cache: bool = True
    """Keep the result in the cache folder and use it again."""

    def __post_init__(self) -> None:
        at_least_one("model.moments", tokens=self.tokens)
        not_negative("model.moments", tolerance=self.tolerance)


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    settings: MomentSettings,
    name: str,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """C0 of each layer, float64 [d_k, d_k] on the CPU, from the cache where it lies there.

    Args:
        lm: the unedited model.
        layers: whose keys.
        settings: the text.
        name: the model's name, for messages only.
        device: where they are summed, as of :func:`accumulate`.

    Raises:
        UserError: where the text can not be read or is too short.
    """
    text_key, tokenizer = text_fingerprint(settings), tokenizer_fingerprint(lm.tokenizer)
    amount = str(settings.tokens)
    if settings.tolerance:  # where reading stops depends on all layers
        amount += f":{settings.tolerance}:{sorted(layers)}"
    model = model_key(fingerprint(lm.model), lm.model)
    paths = {
        layer: cache_dir()
        / "moments"
        / f"{_digest(model, tokenizer, str(layer), lm.anatomy.edit_path, text_key, amount)}.safetensors"
        for layer in layers
    }
    here = ranks.on_first(lambda: [layer for layer, path in paths.items() if settings.cache and path.exists()])
    found = {layer: _read_cached(paths[layer], lm.anatomy.key_size(layer)) for layer in here}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        if settings.tolerance:
            missing = list(layers)  # where reading stops depends on all of them
        log.info("Second moments of layers %s over %d tokens (%s)", missing, settings.tokens, settings.text)
        windows = text_windows(lm, settings, name)
        for layer, moments in accumulate_until(lm, missing, windows, settings.tolerance, device).items():
            found[layer] = moments
            if settings.cache:
                ranks.on_first(partial(_keep, paths[layer], moments))
    else:
        log.info("Second moments of layers %s taken from %s", list(layers), cache_dir() / "moments")
    return found


def _read_cached(path: Path, size: int) -> Tensor:
    return ranks.read_on_first(lambda: read_tensors(path)["moments"], (size, size), dtype=torch.float64)


def _keep(path: Path, moments: Tensor) -> None:
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({"moments": moments}, temporary)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def text_fingerprint(settings: MomentSettings) -> str:
    """What identifies the text: the bytes of a file, the seed of sampled text, a data set's name."""
    if settings.text == "self":
        return f"self:{settings.seed}:{WINDOW}"
    if settings.text.startswith("hub:"):
        return settings.text
    return hashlib.sha256(read_file(settings.text).encode()).hexdigest()


def read_file(path: str) -> str:
    """A text file's content.

    Raises:
        UserError: where it does not exist or is no UTF-8 text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"The text {path!r} does not exist: give a file, hub:<data set>, or self.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The text {path!r} can not be read as UTF-8 ({error}): give a text file.") from error


def _read_hub(name: str) -> str:
    """The first texts of a hub data set, ``hub:dataset[:config[:split]]``, enough for any token count asked for."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("A hub data set needs the package datasets: pip install datasets.") from error
    source, config, split = [*name.split(":")[1:], "", ""][:3]
    try:
        rows = datasets.load_dataset(source, config or None, split=split or "train", streaming=True)
        return "\n".join(row["text"] for row in rows.take(50_000))
    except Exception as error:
        raise UserError(
            f"The data set {name!r} can not be loaded ({type(error).__name__}): check its name and the network."
        ) from error


def read_ids(lm: LanguageModel, text: str, tokens: int) -> list[int]:
    """The first ``tokens`` token ids of a text, without special tokens.

    Raises:
        UserError: where the text has fewer.
    """
    # 12 characters a token is more than any text needs, and saves tokenizing a whole corpus for its beginning.
    ids = list(lm.tokenizer(text[: tokens * 12], add_special_tokens=False, verbose=False)["input_ids"])[:tokens]
    if len(ids) < tokens:
        raise UserError(f"The text has {len(ids)} tokens, and {tokens} are asked for: lower the number of tokens.")
    return ids


def text_windows(lm: LanguageModel, settings: MomentSettings, name: str) -> list[list[int]]:
    """Token ids of the text that the settings name, in windows; ``name`` is the model's, for messages.

    Raises:
        UserError: where the text can not be read or is too short.
    """
    if settings.text == "self":
        return sample_text(lm, settings.tokens, settings.seed, f"Sampling text from {name}")
    text = _read_hub(settings.text) if settings.text.startswith("hub:") else read_file(settings.text)
    ids = read_ids(lm, text, settings.tokens)
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


def sample_text(lm: LanguageModel, tokens: int, seed: int, title: str) -> list[list[int]]:
    """Windows of text sampled from the model: a random first token, then temperature 1 with no cut-off."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    special = set(lm.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(vocabulary, len(lm.tokenizer))) if i not in special], device="cpu")
    count = -(-tokens // WINDOW)
    firsts = ordinary[torch.randint(len(ordinary), (count,), generator=generator, device="cpu")].tolist()
    rows = 4 * ROWS  # one token a row at a time: more rows make up for it
    passes = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
    windows = ranks.each(passes, lambda some: lm.sample([[firsts[i]] for i in some], WINDOW - 1, seed + some[0]), title)
    flat = tokens - WINDOW * (count - 1)
    windows[-1] = windows[-1][:flat]
    return windows


@torch.no_grad()
def accumulate(
    lm: LanguageModel, layers: Sequence[int], windows: Sequence[Sequence[int]], device: torch.device | None = None
) -> dict[int, Tensor]:
    """Second moments of the layers' keys at all tokens of windows of text, float64 [d_k, d_k] on the CPU.

    Each pass adds one product a layer, in float64, to a sum that stays on one device until the end.

    Args:
        lm: the model.
        layers: whose keys.
        windows: token ids.
        device: where products and sums are made; default: the model's, or the CPU where that has no float64.
    """
    modules: dict[Any, tuple[nn.Module, str]] = {layer: (lm.anatomy.edit_module(layer), "input") for layer in layers}
    where = device or (lm.device if has_float64(lm.device) else torch.device("cpu"))

    def add_up(starts: Sequence[int]) -> list[Tensor]:
        sizes = [lm.anatomy.key_size(layer) for layer in layers]
        sums = [torch.zeros(size, size, dtype=torch.float64, device=where) for size in sizes]
        for start in progress(starts, desc="Second moments", unit="pass"):
            seen = lm.read(windows[start : start + ROWS], modules, stop=max(layers))
            for layer, total in zip(layers, sums, strict=True):
                keys = widened(torch.cat([window.pop(layer) for window in seen]), where)
                total.addmm_(keys.T, keys)
        return [total.cpu() for total in sums]

    totals = ranks.summed(range(0, len(windows), ROWS), add_up)
    count = sum(len(window) for window in windows)
    return {layer: total.div_(count) for layer, total in zip(layers, totals, strict=True)}


def accumulate_until(
    lm: LanguageModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    tolerance: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """Second moments as of :func:`accumulate`, over as many of the windows as it takes.

    They are read in parts, each as long as all before it. Before a part is read, its first keys say whether it is
    needed: reading stops where by the moments of each layer they are by less than ``tolerance`` too long
    (:func:`excess`).

    Args:
        lm: the model.
        layers: whose keys.
        windows: of text.
        tolerance: 0 reads all of them.
        device: as of :func:`accumulate`.
    """
    read = len(windows)
    if tolerance:
        read = min(read, -(-KEYS_A_FEATURE * max(map(lm.anatomy.key_size, layers)) // WINDOW))
    found = accumulate(lm, layers, windows[:read], device)
    while read < len(windows):
        part = windows[read : 2 * read]
        longer = ranks.on_first(partial(_most_excess, lm, found, part[:PROBED]))
        tokens = sum(map(len, windows[:read]))
        log.info("Second moments of %d tokens: new keys are %.0f%% longer than theirs", tokens, 100 * longer)
        if longer < tolerance:
            break
        more, new = accumulate(lm, layers, part, device), sum(map(len, part))
        found = {layer: (tokens * found[layer] + new * more[layer]) / (tokens + new) for layer in layers}
        read += len(part)
    return found


def _most_excess(lm: LanguageModel, moments: dict[int, Tensor], windows: Sequence[Sequence[int]]) -> float:
    modules: dict[Any, tuple[nn.Module, str]] = {layer: (lm.anatomy.edit_module(layer), "input") for layer in moments}
    seen = lm.read(windows, modules, stop=max(moments))
    return max(excess(moments[layer], torch.cat([window[layer] for window in seen]).cpu()) for layer in moments)


def excess(moments: Tensor, keys: Tensor) -> float:
    """By which share keys are longer, measured by second moments, than those that the moments were taken over.

    That is ``mean(k^T C^-1 k) / d_k - 1``: 0 for the very keys of the moments, and for others of the same distribution
    what the moments lack yet. Were keys normal, it would be ``(d_k + 1) / (n - d_k - 1)`` with n keys in the moments,
    the mean of an inverse Wishart matrix.

    Args:
        moments: second moments C, [d_k, d_k].
        keys: others, [m, d_k].
    """
    whitened = Preservation.from_moments(moments).whiten(keys.T)
    return float(whitened.square().sum(0).mean()) / len(moments) - 1
