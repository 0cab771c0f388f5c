"""Second moments C0 = E[k k^T] of keys over ordinary text: what an edit should leave alone.

Text is streamed in windows, sums are kept in float64, blocks above the highest layer asked for never run, several
ranks share the passes, and the result is cached under a fingerprint of the weights, the layers and the text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from editlab.distributed import ranks
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.precision import has_float64, widened
from editlab.lm.text import WINDOW, read_windows, text_key
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.solver.closed_form import Preservation
from editlab.utils.disk_cache import TENSORS, DiskCache, key_of
from editlab.utils.files import cache_dir
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, not_negative

log = logging.getLogger(__name__)

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
    model, text_key = model_key(fingerprint(lm.model), lm.model), text_fingerprint(settings)
    kept = DiskCache(cache_dir() / "moments", TENSORS)
    keys = {
        layer: key_of(
            model=model, tokenizer=tokenizer_fingerprint(lm.tokenizer), layer=layer, module=lm.anatomy.edit_path,
            text=text_key, tokens=settings.tokens,
            # With a tolerance, the keys of all layers decide where reading stops.
            stop=[settings.tolerance, sorted(layers)] if settings.tolerance else None,
        )
        for layer in layers
    }  # fmt: skip
    read: dict[int, Tensor] = {}  # on the first rank alone

    def look() -> list[int]:
        entries = {layer: kept.read(key) for layer, key in keys.items()} if settings.cache else {}
        read.update({layer: entry["moments"] for layer, entry in entries.items() if entry is not None})
        return list(read)

    found: dict[int, Tensor] = {}
    for layer in ranks.on_first(look):
        size = lm.anatomy.key_size(layer)
        found[layer] = ranks.read_on_first(partial(read.__getitem__, layer), (size, size), dtype=torch.float64)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        if settings.tolerance:
            missing = list(layers)  # the keys of all layers decide where reading stops
        log.info("Second moments of layers %s over %d tokens (%s)", missing, settings.tokens, settings.text)
        windows = text_windows(lm, settings, name)
        for layer, moments in accumulate_until(lm, missing, windows, settings.tolerance, device).items():
            found[layer] = moments
            if settings.cache:
                ranks.on_first(partial(kept.write, keys[layer], {"moments": moments}))
    else:
        log.info("Second moments of layers %s taken from %s", list(layers), kept.folder)
    return found


def text_fingerprint(settings: MomentSettings) -> str:
    """What identifies the text that the settings name (:func:`editlab.lm.text.text_key`)."""
    return text_key(settings.text, settings.seed)


def text_windows(lm: LanguageModel, settings: MomentSettings, name: str) -> list[list[int]]:
    """Token ids of the text that the settings name, in windows; ``name`` is the model's, for messages.

    Raises:
        UserError: the text cannot be read or is too short.
    """
    title = f"Sampling text from {name}"
    return read_windows(
        lm, settings.text, settings.tokens, seed=settings.seed, title=title, cache=settings.cache
    )  # fmt: skip


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
