"""Second moments C0 = E[k k^T] of the keys of ordinary text, whose outputs an edit should not change.

For a mixture of experts C0 keeps only its blocks on the diagonal, E[g_e^2 h_e h_e^T] for each expert e, because the
whole matrix of the joint keys (:mod:`editlab.lm.experts`) fits into no memory. A token goes to k experts, so the blocks
bound what an update does to ordinary text: by the inequality of Cauchy and Schwarz ``||delta k||^2 <= k sum_e ||delta_e
g_e h_e||^2``, which says that k times the blocks minus C0 is positive semidefinite.

Text is read in windows (:mod:`editlab.lm.text`), without the keys of the special tokens before it. Sums are in float64.
Blocks above the highest of the layers do not run. Several ranks share the passes. The result is cached under a
fingerprint of the weights, the layers and the text.
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
from editlab.keys.moment_files import find_file, read_moments
from editlab.lm.fingerprint import fingerprint, model_key
from editlab.lm.language_model import LanguageModel
from editlab.lm.precision import has_float64, widened
from editlab.lm.text import WINDOW, read_windows, reading, text_key, text_of
from editlab.lm.tokens import tokenizer_fingerprint
from editlab.solver.preservation import Preservation
from editlab.utils.disk_cache import TENSORS, DiskCache, key_of
from editlab.utils.files import cache_dir
from editlab.utils.progress import progress
from editlab.utils.validation import at_least_one, not_negative

log = logging.getLogger(__name__)

ROWS = 32
"""Number of windows in a forward pass."""
FEWEST_ROWS = 4
"""Number of windows in a forward pass of a mixture of many experts, whose joint keys take much memory."""
KEYS_A_FEATURE = 2
"""Number of keys for each feature that are read before new keys are compared with the tolerance."""
PROBED = 16
"""Number of windows whose keys are compared with the tolerance."""


@dataclass
class MomentSettings:
    """Settings of the text that the second moments are computed from."""

    text: str = "self"
    """``self`` (text that the model samples itself), a text file, or ``hub:dataset[:config[:split]]``."""
    tokens: int = 24576
    """Largest number of tokens of text. Ten times d_k or more is usual in the literature."""
    tolerance: float = 0.0
    """Reading stops when the excess length of new keys, measured by the moments so far, is under this fraction
    (:func:`excess`). With ten keys for each feature the excess is 0.11 if keys are normal. 0 reads all tokens."""
    seed: int = 0
    """Seed of the sampling if ``text`` is ``self``."""
    cache: bool = True
    """Whether the result is kept in the cache folder for later runs."""
    file: str | None = None
    """Published second moments (:mod:`editlab.keys.moment_files`) to use in place of a text, so that the settings above
    have no effect: a ``.npz`` of ROME's and MEMIT's code, a ``.pt`` or a ``.safetensors``. For several layers a folder
    with a file for each, or a path with ``{layer}`` in place of the number. They are the sum of ``k k^T`` and the
    number of tokens, and have to be of the very model that is edited."""

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
    """C0 of each layer, float64 on the CPU; read from the cache if it is there.

    Args:
        lm: the unedited model.
        layers: numbers of the layers.
        settings: settings of the text.
        name: the model's name, for messages only.
        device: as for :func:`accumulate`.

    Raises:
        UserError: The text cannot be read or is too short, or a file of published moments does not fit the model.
    """
    if settings.file is not None:
        return _published(lm, layers, settings.file)
    model, text_key = model_key(fingerprint(lm.model), lm.model), text_fingerprint(settings)
    kept = DiskCache(cache_dir() / "moments", TENSORS)
    keys = {
        layer: key_of(
            model=model, tokenizer=tokenizer_fingerprint(lm.tokenizer), layer=layer, module=lm.anatomy.edit_path,
            text=text_key, tokens=settings.tokens, **reading(lm),
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
        shape = lm.anatomy.moments_shape(layer)
        found[layer] = ranks.read_on_first(partial(read.__getitem__, layer), shape, dtype=torch.float64)
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
        log.info("Second moments of layers %s read from %s", list(layers), kept.folder)
    return found


def _published(lm: LanguageModel, layers: Sequence[int], setting: str) -> dict[int, Tensor]:
    """C0 of each layer from published files; only the first rank reads them."""
    lm.anatomy.require_one_map("model.moments.file")
    read: dict[int, Tensor] = {}

    def load() -> None:
        for layer in layers:
            path = find_file(setting, layer, len(layers), lm.anatomy)
            found = read_moments(path, layer, lm.anatomy)
            log.info("Second moments of layer %d read from %s: %s", layer, path, found)
            read[layer] = found.moments

    ranks.on_first(load)
    sizes = {layer: lm.anatomy.key_size(layer) for layer in layers}
    return {
        layer: ranks.read_on_first(partial(read.__getitem__, layer), (size, size), dtype=torch.float64)
        for layer, size in sizes.items()
    }


def text_fingerprint(settings: MomentSettings) -> str:
    """Identity of the text that the settings name (:func:`editlab.lm.text.text_key`)."""
    return text_key(settings.text, settings.seed)


def text_windows(lm: LanguageModel, settings: MomentSettings, name: str) -> list[list[int]]:
    """Token ids of the text that the settings name, in windows; ``name`` is the model's, for messages.

    Raises:
        UserError: The text cannot be read or is too short.
    """
    title = f"Sampling text from {name}"
    return read_windows(
        lm, settings.text, settings.tokens, seed=settings.seed, title=title, cache=settings.cache
    )  # fmt: skip


@torch.no_grad()
def accumulate(
    lm: LanguageModel, layers: Sequence[int], windows: Sequence[Sequence[int]], device: torch.device | None = None
) -> dict[int, Tensor]:
    """Second moments of the layers' keys at the tokens of text in windows, float64 on the CPU.

    They are [d_k, d_k], or for a mixture of experts [experts, features, features].

    Each pass adds one float64 product for each layer to a sum that stays on one device until the end.

    Args:
        lm: the model.
        layers: numbers of the layers.
        windows: token ids of each window, as :func:`editlab.lm.text.cut` makes them. The keys of the special tokens
            with which they begin are left out: they are unlike others, and no edit is made at them.
        device: device of products and sums; default: the model's, or the CPU if that has no float64.
    """
    modules: dict[Any, tuple[nn.Module, str]] = {layer: (lm.anatomy.edit_module(layer), "input") for layer in layers}
    where = device or (lm.device if has_float64(lm.device) else torch.device("cpu"))
    before = len(lm.beginning)

    shapes = [lm.anatomy.moments_shape(layer) for layer in layers]
    together = max(FEWEST_ROWS, min(ROWS // shape[0] if len(shape) == 3 else ROWS for shape in shapes))

    def add_up(starts: Sequence[int]) -> list[Tensor]:
        sums = [torch.zeros(shape, dtype=torch.float64, device=where) for shape in shapes]
        for start in progress(starts, desc="Second moments", unit="pass"):
            seen = lm.read(windows[start : start + together], modules, stop=max(layers))
            for layer, total in zip(layers, sums, strict=True):
                _add_products(total, torch.cat([window.pop(layer)[before:] for window in seen]))
        return [total.cpu() for total in sums]

    totals = ranks.summed(range(0, len(windows), together), add_up)
    for layer, total in zip(layers, totals, strict=True):
        if total.dim() == 3 and (unused := int((total.flatten(1).abs().amax(1) == 0).sum())):
            log.warning("Layer %d: no token of the text went to %d of %d experts, so their outputs are not preserved: "
                        "raise model.moments.tokens", layer, unused, len(total))  # fmt: skip
    count = _tokens(lm, windows)
    return {layer: total.div_(count) for layer, total in zip(layers, totals, strict=True)}


def _add_products(total: Tensor, keys: Tensor) -> None:
    """Add ``sum k k^T`` over keys [tokens, d_k] to a sum, or its blocks on the diagonal to one for each expert."""
    if total.dim() == 2:
        keys = widened(keys, total.device)
        total.addmm_(keys.T, keys)
        return
    for block, part in zip(total, keys.split(total.shape[-1], dim=1), strict=True):
        there = widened(part[(part != 0).any(1)], total.device)  # the tokens that went to this expert
        block.addmm_(there.T, there)


def accumulate_until(
    lm: LanguageModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    tolerance: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """Second moments as :func:`accumulate` computes them, over as many of the windows as are needed.

    Windows are read in parts, each as long as all parts before it. Before a part is read, :func:`excess` compares its
    first keys with the moments so far: reading stops if the excess is under the tolerance at every layer.

    Args:
        lm: the model.
        layers: numbers of the layers.
        windows: as for :func:`accumulate`.
        tolerance: largest acceptable excess; 0 reads all windows.
        device: as for :func:`accumulate`.
    """
    read = len(windows)
    if tolerance:
        read = min(read, -(-KEYS_A_FEATURE * max(map(lm.anatomy.key_size, layers)) // WINDOW))
    found = accumulate(lm, layers, windows[:read], device)
    while read < len(windows):
        part = windows[read : 2 * read]
        longer = ranks.on_first(partial(_most_excess, lm, found, part[:PROBED]))
        tokens = _tokens(lm, windows[:read])
        log.info("Second moments of %d tokens: new keys are %.0f%% longer than theirs", tokens, 100 * longer)
        if longer < tolerance:
            break
        more, new = accumulate(lm, layers, part, device), _tokens(lm, part)
        found = {layer: (tokens * found[layer] + new * more[layer]) / (tokens + new) for layer in layers}
        read += len(part)
    return found


def _most_excess(lm: LanguageModel, moments: dict[int, Tensor], windows: Sequence[Sequence[int]]) -> float:
    modules: dict[Any, tuple[nn.Module, str]] = {layer: (lm.anatomy.edit_module(layer), "input") for layer in moments}
    seen = lm.read(windows, modules, stop=max(moments))
    keys = {layer: torch.cat([window[layer][len(lm.beginning) :] for window in seen]).cpu() for layer in moments}
    return max(excess(moments[layer], keys[layer]) for layer in moments)


def _tokens(lm: LanguageModel, windows: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens of text in windows."""
    return sum(len(text_of(lm, window)) for window in windows)


def excess(moments: Tensor, keys: Tensor) -> float:
    """Excess length of keys, measured by second moments: ``mean(k^T C^-1 k) / d_k - 1``.

    It is 0 for the keys that the moments were computed from. For other keys of the same distribution it falls towards
    0 as the moments are computed from more keys: for normal keys it is ``(d_k + 1) / (n - d_k - 1)`` with n keys in the
    moments (by the mean of an inverse Wishart matrix).

    Args:
        moments: second moments C, [d_k, d_k], or the blocks of experts.
        keys: keys that the moments were not computed from, [m, d_k].
    """
    whitened = Preservation.from_moments(moments).whiten(keys.T)
    return float(whitened.square().sum(0).mean()) / keys.shape[1] - 1
