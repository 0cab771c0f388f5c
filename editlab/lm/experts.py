"""The experts of a block as one linear map: a mixture of experts is edited like any other layer.

A router sends each token to a few experts and weighs their outputs. With the weight ``g_e`` of expert ``e`` (0 if the
token is not sent there), its hidden features ``h_e`` and its output projection ``W_e``, the experts output::

    sum_e W_e (g_e h_e) = [W_1 ... W_E] [g_1 h_1; ...; g_E h_E]

This is one linear map of the *joint key* on the right, whose weight is the output projections side by side. The router
reads the block's input, so an update of this weight does not change the routing of its own layer, and the closed form
holds exactly.

Transformers stores the projections of all experts as one parameter with three dimensions, and the features as no
module's input. No name is assumed here: the parameter is the one in which the experts' output is linear, and features
are read by the experts' own forward pass, with unit matrices in place of the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from editlab.errors import UserError
from editlab.utils.compat import replace_parameters

_SAME = 0.05
"""Relative error up to which two outputs count as equal; bfloat16 rounding causes less."""
_TOKENS = 4
"""Number of tokens on which the linearity of a parameter is tested."""


class JointMap(nn.Module):
    """The output projections of a block's experts as one linear map from joint keys to the experts' output.

    Hooks on it are run in the forward passes of the experts: a hook on its input gets the joint keys.

    Args:
        experts: the module whose forward takes hidden states [tokens, d_v], the experts of each token, long [tokens,
            k], and their weights [tokens, k].
        name: name of the parameter that holds the projections.
        transposed: whether it is [experts, features, d_v] and not [experts, d_v, features].
    """

    def __init__(self, experts: nn.Module, name: str, transposed: bool) -> None:
        super().__init__()
        self.experts, self.name, self.transposed = experts, name, transposed
        shape = self.weight.shape
        self.count: int = shape[0]
        """number of experts"""
        self.features: int = shape[1] if transposed else shape[2]
        """number of features of each expert"""
        self.out_features: int = shape[2] if transposed else shape[1]
        """d_v, the width of the residual stream"""
        self._constant = True
        """whether the experts' output has a part that does not depend on the weight, such as biases"""

    def like(self, experts: nn.Module) -> JointMap:
        """The joint map of another block's experts, whose weights are stored in the same way."""
        found = JointMap(experts, self.name, self.transposed)
        found._constant = self._constant
        return found

    @property
    def in_features(self) -> int:
        """d_k, the width of the joint key: experts times features."""
        return self.count * self.features

    @property
    def weight(self) -> nn.Parameter:
        """The parameter with the projections of all experts, as the model stores it."""
        return getattr(self.experts, self.name)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The projections side by side, [d_v, d_k], of a tensor in the layout of :attr:`weight`."""
        if self.transposed:
            return weight.reshape(-1, self.out_features).T
        return weight.transpose(0, 1).reshape(self.out_features, -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix [d_v, d_k] in the layout of :attr:`weight`."""
        if self.transposed:
            return matrix.T.reshape(self.count, self.features, self.out_features)
        return matrix.view(self.out_features, self.count, self.features).transpose(0, 1)

    def forward(self, keys: Tensor) -> Tensor:
        """The map itself: joint keys [tokens, d_k] -> [tokens, d_v]."""
        return nn.functional.linear(keys, self.as_matrix(self.weight))

    @torch.no_grad()
    def joint_keys(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The joint key of each token, [tokens, d_k]; features of experts that a token is not sent to are 0.

        Args:
            hidden: what the experts read, [tokens, d_v].
            chosen: the experts of each token, long [tokens, k].
            gates: their weights, [tokens, k].
        """
        keys = hidden.new_zeros(len(hidden), self.count, self.features)
        rows = torch.arange(len(hidden), device=hidden.device)
        zero = torch.zeros_like(self.weight) if self._constant else None
        for start in range(0, self.features, self.out_features):
            size = min(self.out_features, self.features - start)
            units = torch.zeros_like(self.weight)  # they make these features of an expert its output
            there = units.mT if self.transposed else units
            there[:, :size, start : start + size] = torch.eye(size, device=units.device, dtype=units.dtype)
            for choice in range(chosen.shape[1]):  # the experts' own forward would add them up
                tokens = (hidden, chosen[:, choice : choice + 1], gates[:, choice : choice + 1])
                features = self._output(units, *tokens)
                if zero is not None:
                    features = features - self._output(zero, *tokens)
                keys[rows, chosen[:, choice], start : start + size] += features[:, :size].to(keys)
        return keys.flatten(1)

    def is_linear(self) -> bool:
        """Whether the experts' output, on random tokens, is this map of their joint keys up to a constant."""
        weight, generator = self.weight, torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            # Lightning loads the model with its device as the default device, on which a CPU generator cannot draw.
            return torch.randn(*shape, generator=generator, device="cpu").to(weight)

        chosen = torch.arange(2 * _TOKENS, device=weight.device).view(_TOKENS, 2) % self.count
        tokens = (drawn(_TOKENS, self.out_features), chosen, drawn(_TOKENS, 2).abs())
        output, features = drawn(self.out_features, 1), drawn(1, self.in_features)
        try:
            constant = self._output(torch.zeros_like(weight), *tokens)
            moved = self._output(self.as_weight(output @ features), *tokens) - constant
            self._constant = bool(constant.any())
            expected = self.joint_keys(*tokens) @ features.T @ output.T
        except (RuntimeError, TypeError, ValueError, IndexError):  # the parameter or the module is of another kind
            return False
        return 0 < moved.norm() < torch.inf and bool((moved - expected).norm() < _SAME * moved.norm())

    @torch.no_grad()
    def _output(self, weight: Tensor, *tokens: Tensor) -> Tensor:
        """The experts' output with other projections."""
        own = self.weight
        replace_parameters(self.experts, {self.name: nn.Parameter(weight.contiguous(), requires_grad=False)})
        try:
            output: Tensor = self.experts.forward(*tokens)  # not a call, which would run hooks
        finally:
            replace_parameters(self.experts, {self.name: own})
        return output

    # ---- hooks --------------------------------------------------------------------------------------------------

    def register_forward_pre_hook(  # type: ignore[override]
        self, hook: Callable[..., Any], *, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Run a hook on the joint keys in each forward pass; if it returns other keys, the output is that of these."""

        def after(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            keys = self.joint_keys(*self._routed(args, kwargs))
            found = hook(self, (keys,), {}) if with_kwargs else hook(self, (keys,))
            if found is None:
                return None
            replaced = found[0][0] if with_kwargs else found[0]
            return output.detach() + self(replaced - keys)

        return self.experts.register_forward_hook(after, with_kwargs=True)

    def _routed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, choices and gates in the arguments of a call of the experts."""
        hidden, chosen, gates = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:3]
        if chosen.is_floating_point() or chosen.shape != gates.shape:
            raise UserError(
                f"The router of {type(self.experts).__name__} does not give each token a list of experts and their "
                "weights, so the keys of the experts cannot be read: name another map with model.edit_module."
            )
        k = chosen.shape[-1]
        return hidden.reshape(-1, self.out_features), chosen.reshape(-1, k), gates.reshape(-1, k)

    def register_forward_hook(self, hook: Callable[..., Any]) -> RemovableHandle:  # type: ignore[override]
        """Run a hook on the experts' output in each forward pass; in place of an input it gets an empty tuple."""
        return self.experts.register_forward_hook(lambda experts, args, output: hook(self, (), output))


def joint_map(module: nn.Module, width: int) -> JointMap | None:
    """The joint map of a module of experts that writes ``width`` features; None if it is not one."""
    stacks = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
    found = [
        JointMap(module, name, transposed)
        for name, weight in stacks.items()
        for transposed in (False, True)
        if weight.shape[2 if transposed else 1] == width
    ]
    return next((one for one in found if one.is_linear()), None)


def experts_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block with stacked weight matrices, by their paths."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for path, part in block.named_modules():
        if isinstance(part, convolutions):
            continue
        if any(weight.squeeze().dim() > 2 for weight in part.parameters(recurse=False)):
            yield path, part
