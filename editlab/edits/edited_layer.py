"""Edited weights, and the optimizer through which Lightning's global_step counts batches of edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editlab.distributed import ranks
from editlab.lm.experts import JointMap
from editlab.lm.placement import load_offloaded
from editlab.lm.quantized import has_narrow_weight, in_full_precision
from editlab.lm.runner import ModelRunner


class EditedLayer(nn.Module):
    """One edited weight: the original, the running sum of updates in float32, and the parameter made of both.

    ``W = (W0 + sum).to(dtype)``, so that thousands of small updates are not rounded away in a 16-bit weight. The
    sum is in mathematical orientation [d_v, d_k] whichever way the module stores its weight. An adapter may be added
    on top of the sum; it is not saved with this layer but by the callback that set it.

    Args:
        module: a Linear, GPT-2's Conv1D or the joint map of experts; its weight is written in place.
        transposed: whether the module stores [d_k, d_v].
    """

    total: Tensor
    original: Tensor

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        super().__init__()
        self._modules_outside = (module,)  # in a tuple, so that it is not registered here as well
        self.transposed = transposed
        load_offloaded(self.owner)
        weight = self.weight.detach()
        shape = self._matrix(weight).shape
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float32, device=weight.device))
        self.register_buffer("original", weight.clone(), persistent=False)
        self.adapter: Tensor | None = None
        self.set_aside = False  # while True the weight is the original one: see unedited()
        self.register_load_state_dict_post_hook(lambda layer, _: layer.write())

    @classmethod
    def of(cls, lm: ModelRunner, layer: int) -> EditedLayer:
        """The MLP output projection of a model's layer; a quantized one gets full precision first."""
        if has_narrow_weight(lm.anatomy.edit_module(layer)):
            in_full_precision(lm.model, lm.anatomy.edit_name(layer))
        return cls(lm.anatomy.edit_module(layer), lm.anatomy.transposed(layer))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditedLayer:
        """Moves the module; the sum and the adapter keep their types, since ``bf16-true`` would round them."""
        total = self.total
        super()._apply(fn, recurse)
        self.total = total.to(self.total.device)
        if self.adapter is not None:
            self.adapter = self.adapter.to(self.total.device)
        return self

    @property
    def module(self) -> nn.Module:
        """The linear map whose weight is edited."""
        return self._modules_outside[0]

    @property
    def owner(self) -> nn.Module:
        """The module of the model that has the weight: the linear map, or the module of the experts."""
        return self.module.experts if isinstance(self.module, JointMap) else self.module

    @property
    def weight(self) -> Tensor:
        """The weight parameter of the module."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def original_matrix(self) -> Tensor:
        """The original weight as a matrix [d_v, d_k]."""
        return self._matrix(self.original)

    def _matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the module's layout as a matrix [d_v, d_k]."""
        if isinstance(self.module, JointMap):
            return self.module.as_matrix(weight)
        return weight.T if self.transposed else weight

    @property
    def edited(self) -> bool:
        """Whether the sum or an adapter changes the weight."""
        return self.adapter is not None or bool(self.total.any())

    @torch.no_grad()
    def write(self) -> None:
        """Sets the parameter to :meth:`value`, or to the original while ``set_aside``."""
        self.weight.copy_(self.original if self.set_aside else self.value())

    def value(self) -> Tensor:
        """The weight that this layer makes: original + sum + adapter, in the module's orientation and type."""
        if not self.edited:
            return self.original  # a sum would turn -0.0 into 0.0
        total = self.total if self.adapter is None else self.total + self.adapter
        if isinstance(self.module, JointMap):
            total = self.module.as_weight(total)
        elif self.transposed:
            total = total.T
        # The wider of the two types: a 16-bit original is summed in float32, a float64 one keeps its digits.
        return (self.original + total).to(self.weight.dtype)

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Adds an update [d_v, d_k] to the sum and writes the weight; with several ranks, the first rank's update."""
        self.total.add_(ranks.broadcast(update.to(self.total)))
        self.write()

    @torch.no_grad()
    def restore(self, total: Tensor) -> None:
        """Sets the sum to an earlier one, bit for bit, and writes the weight."""
        self.total.copy_(total)
        self.write()

    def set_adapter(self, adapter: Tensor | None) -> None:
        """Sets or removes the adapter's dense update, float32 [d_v, d_k], and writes the weight.

        With several ranks, the first rank's adapter is used.
        """
        self.adapter = None if adapter is None else ranks.broadcast(adapter)
        self.write()

    @torch.no_grad()
    def relative_norm(self) -> float:
        """Frobenius norm of the sum over that of the original weight."""
        return float(self.total.norm() / self.original.float().norm())


class ClosedFormOptimizer(torch.optim.Optimizer):
    """An optimizer without gradients: its step runs one closed-form solve, which adds the updates to the weights.

    It exists because Lightning counts optimizer steps: ``global_step`` is then the number of batches, and checkpoints
    and ``max_steps`` work.

    Args:
        layers: the edited layers.
    """

    def __init__(self, layers: Iterable[EditedLayer]) -> None:
        self.layers = list(layers)
        super().__init__([layer.weight for layer in self.layers], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Runs the closure once.

        Args:
            closure: solves a batch and adds its updates to the layers.

        Raises:
            ValueError: No closure is given; there is no gradient to step along.
        """
        if closure is None:
            raise ValueError("ClosedFormOptimizer.step needs a closure that solves a batch and adds its updates")
        closure()


@contextmanager
def unedited(layers: Iterable[EditedLayer]) -> Iterator[None]:
    """Puts the original weights in place inside the ``with``; afterwards the edited ones are back, bit for bit.

    It may be nested: the edits come back when the outermost ``with`` ends.
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
