"""The optimizer whose step adds a solved update, so that Lightning's global_step counts edit batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editlab.distributed import ranks
from editlab.lm.placement import settle


class EditedLayer(nn.Module):
    """One edited weight: the original, the running sum of updates in float32, and the parameter made of both.

    ``W = (W0 + sum).to(dtype)``, so that thousands of small updates are not rounded away in a 16-bit weight. The
    sum is in mathematical orientation [d_v, d_k] whatever way round the module stores its weight. An adapter may
    stand beside the sum: it is part of the weight, can be switched off, and whoever set it keeps it.

    Args:
        module: a Linear or GPT-2's Conv1D; its weight is written in place.
        transposed: whether the module stores [d_k, d_v].
    """

    total: Tensor
    original: Tensor

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        super().__init__()
        self._modules_outside = (module,)  # in a tuple: it belongs to the model and is not registered here again
        self.transposed = transposed
        settle(module)
        weight = self.weight.detach()
        shape = weight.T.shape if transposed else weight.shape
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float32, device=weight.device))
        self.register_buffer("original", weight.clone(), persistent=False)
        self.adapter: Tensor | None = None
        self.set_aside = False  # while it is True the weight is the original one: see unedited()
        self.register_load_state_dict_post_hook(lambda layer, _: layer.write())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditedLayer:
        """Move to another device or type; the sum and the adapter only move, as a 16-bit type would round them."""
        total = self.total
        super()._apply(fn, recurse)
        self.total = total.to(self.total.device)
        if self.adapter is not None:
            self.adapter = self.adapter.to(self.total.device)
        return self

    @property
    def weight(self) -> Tensor:
        """The module's parameter."""
        return self._modules_outside[0].weight  # type: ignore[return-value]

    @property
    def edited(self) -> bool:
        """Whether the sum or an adapter makes the weight another than the original."""
        return self.adapter is not None or bool(self.total.any())

    @torch.no_grad()
    def write(self) -> None:
        """Sets the parameter to the original plus the running sum and the adapter; to the original if set aside."""
        if self.set_aside or not self.edited:
            self.weight.copy_(self.original)  # to the bit: -0.0 plus nothing is 0.0
            return
        total = self.total if self.adapter is None else self.total + self.adapter
        total = total.T if self.transposed else total
        # The wider of the two types: a 16-bit original is summed in float32, a float64 one keeps its digits.
        self.weight.copy_((self.original + total).to(self.weight.dtype))

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Adds an update [d_v, d_k] to the sum and writes the weight; of several ranks' updates the first one's."""
        self.total.add_(ranks.same(update.to(self.total)))
        self.write()

    @torch.no_grad()
    def restore(self, total: Tensor) -> None:
        """Sets the sum to an earlier one, bit for bit, and writes the weight."""
        self.total.copy_(total)
        self.write()

    def set_adapter(self, adapter: Tensor | None) -> None:
        """Puts what an adapter adds, float32 [d_v, d_k], beside the sum, or takes it away; writes the weight.

        Of several ranks' adapters the first one's is taken.
        """
        self.adapter = None if adapter is None else ranks.same(adapter)
        self.write()

    @torch.no_grad()
    def relative_norm(self) -> float:
        """Frobenius norm of the sum over that of the original weight."""
        return float(self.total.norm() / self.original.float().norm())


class ClosedFormOptimizer(torch.optim.Optimizer):
    """Applies updates that a closed form gives, layer by layer; needs no gradient.

    Args:
        layers: the edited layers.
    """

    def __init__(self, layers: Iterable[EditedLayer]) -> None:
        self.layers = list(layers)
        super().__init__([layer.weight for layer in self.layers], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Adds each update that ``closure()`` gives.

        Args:
            closure: returns an iterable of (layer, update [d_v, d_k]). It may be a generator: each update is added
                before the next is asked for, so a layer's solve sees the layers below it already edited.

        Raises:
            ValueError: without a closure; there is no gradient to step along.
        """
        if closure is None:
            raise ValueError("ClosedFormOptimizer.step needs a closure that gives (layer, update) pairs")
        for layer, update in closure():
            layer.add(update)


@contextmanager
def unedited(layers: Iterable[EditedLayer]) -> Iterator[None]:
    """Within it the weights are the original ones; afterwards they are as edited, bit for bit.

    It may be entered again inside itself: the edits come back where the outermost one is left.
    """
    layers = [layer for layer in layers if not layer.set_aside]
    if not any(layer.edited for layer in layers):
        layers = []
    for layer in layers:
        layer.set_aside = True
        layer.write()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_aside = False
            layer.write()
