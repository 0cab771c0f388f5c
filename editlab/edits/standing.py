"""Edits of one weight by several independent runs, each of which can be removed without the others.

Every run knows the weight that it found and the sum of its own updates. If a later run has edited the same weight, the
earlier one cannot be removed by writing back what it found: that would remove the later edits too, and removing the
later run afterwards would put the earlier edits back. So a removal also corrects what later runs take for the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from editlab.edits.edited_layer import EditedLayer

_STANDING: WeakKeyDictionary[nn.Module, list[ref[EditedLayer]]] = WeakKeyDictionary()
"""Owner of a weight -> its edited layers, oldest first, as long as their runs' results are referenced. It is not a
cache: neither the model nor a run knows which runs have edited the model."""


def record(layers: Iterable[EditedLayer]) -> None:
    """Record that the edits of a finished run are in the weights of these layers."""
    for layer in layers:
        _STANDING.setdefault(layer.owner, []).append(ref(layer))


def remove(layers: Iterable[EditedLayer]) -> None:
    """Remove the edits of a recorded run; edits of later runs, and other changes of the weights, stay.

    If no other edit is left and nothing else has changed the weights, they are what they were before, bit for bit;
    otherwise they are so up to rounding. Layers that were removed before are ignored.
    """
    for layer in layers:
        standing = [other for one in _STANDING.get(layer.owner, []) if (other := one()) is not None]
        index = next((i for i, other in enumerate(standing) if other is layer), None)
        if index is not None:
            _remove(layer, standing[index + 1 :])
            _STANDING[layer.owner] = [ref(other) for other in standing if other is not layer]


@torch.no_grad()
def _remove(layer: EditedLayer, later: list[EditedLayer]) -> None:
    before, after = layer.value().clone(), layer.original.clone()
    layer.adapter = None
    layer.total.zero_()
    for follower in later:
        value = follower.value().clone()
        follower.original.copy_(_without(follower.original, before, after))
        before, after = value, follower.value().clone()
    layer.weight.copy_(_without(layer.weight, before, after))


def _without(weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return ``after`` if a weight equals ``before`` bit for bit; else the weight with the difference subtracted."""
    before, after = before.to(weight.device), after.to(weight.device)
    if weight.dtype == before.dtype and torch.equal(_bits(weight), _bits(before)):
        return after
    return (weight.double() - (before.double() - after.double())).to(weight.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in which also NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
