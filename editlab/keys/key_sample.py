"""Keys of many facts at several layers, read in the same forward passes of the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editlab.data.fact import Fact
from editlab.keys.subject_keys import locate
from editlab.lm.language_model import LanguageModel
from editlab.utils.progress import progress

CHUNK = 128
"""Number of facts that are read between two steps of the progress bar."""


@dataclass(frozen=True)
class KeySample:
    """Keys of facts at one layer in their bare prompts."""

    keys: Tensor
    """float64 [d_k, n]"""
    context_keys: Tensor
    """keys of the bare prompts' context tokens (:class:`~editlab.keys.subject_keys.Keys`), float64 [d_k, m]"""
    context_fact: Tensor
    """long [m], ascending: the fact whose prompt each context key is in"""


def read_key_sample(lm: LanguageModel, facts: Sequence[Fact], layers: Sequence[int]) -> dict[int, KeySample]:
    """Reads the keys of facts at some layers, each fact once; blocks above the highest layer do not run.

    Args:
        lm: the model, with the weights as they are.
        facts: the facts.
        layers: numbers of the layers.
    """
    modules: dict[Any, tuple[nn.Module, str]] = {layer: (lm.anatomy.edit_module(layer), "input") for layer in layers}
    at_subject: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    elsewhere: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    numbers: list[int] = []
    with progress(total=len(facts), desc="Keys", unit="fact") as bar:
        for start in range(0, len(facts), CHUNK):
            located = [locate(lm, fact) for fact in facts[start : start + CHUNK]]
            seen = lm.read([encoding.ids for encoding, _ in located], modules, stop=max(layers))
            for number, ((encoding, last), row) in enumerate(zip(located, seen, strict=True), start):
                context = [token for token in range(1, len(encoding.ids)) if token != last]
                numbers += [number] * len(context)
                for layer in layers:
                    keys = row[layer].double().cpu()
                    at_subject[layer].append(keys[last])
                    elsewhere[layer].append(keys[context])
            bar.update(len(located))
    fact = torch.tensor(numbers, dtype=torch.long)
    return {
        layer: KeySample(torch.stack(at_subject[layer], 1), torch.cat(elsewhere[layer]).T.contiguous(), fact)
        for layer in layers
    }
