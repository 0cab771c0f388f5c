"""Consolidated memory: all past keys in the metric, so that every later update spares them; at constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editlab.utils.validation import above_zero, decays

TINY = 1e-9
"""Share of the largest eigenvalue under which one is taken for 0."""


class PastKeys:
    """For each layer ``P = sum over batches of forget^age * (weight * sum k k^T)``, float64 [d_k, d_k].

    In the metric ``C + P`` a later update pays ``weight * ||delta k||^2`` for moving a past edit's output. With
    ``weight = 1 / slack`` and no forgetting a sequence of batches is one joint batch over all of their edits, since
    both minimize the same quadratic (recursive least squares).

    Args:
        weight: of each past key.
        forget: what is left of the past after each batch, 0 to 1; 1 forgets nothing.

    Raises:
        UserError: for a weight that is not positive, or a share out of range.
    """

    def __init__(self, weight: float, forget: float = 1.0) -> None:
        above_zero("MemoryReplay", past_weight=weight)
        decays("MemoryReplay", forget=forget)
        self.weight = weight
        self.forget = forget
        self.moments: dict[int, Tensor] = {}

    def add(self, layer: int, keys: Tensor, others: Tensor, others_weight: float) -> None:
        """One batch's keys [d_k, n], and keys of its prompts' other tokens [d_k, m] with the weight they have."""
        # On the CPU, where a resumed run has them too: elsewhere the next removal might round otherwise.
        new = _symmetric(self.weight * keys @ keys.T + others_weight * others @ others.T).cpu()
        past = self.moments.get(layer)
        self.moments[layer] = new if past is None else self.forget * past + new

    def remove(self, layer: int, keys: Tensor, ages: Tensor) -> None:
        """Takes keys [d_k, n] out again that were added ``ages`` [n] batches before the last one.

        A key may have moved since, where layers below it are edited: then as much is taken out in its direction as
        leaves ``P`` positive semidefinite, and no more than was put in. It costs one eigendecomposition of ``P``.
        """
        past = self.moments.get(layer)
        if past is None or not keys.numel():
            return
        weights = [self.weight * self.forget**age for age in ages.tolist()]
        self.moments[layer] = past - _symmetric(_removable(past, keys.to(past), weights))

    def state_dict(self) -> dict[int, Tensor]:
        """Layer -> the lower triangle, row by row, float64 [d_k (d_k + 1) / 2]: half of the symmetric matrix."""
        packed = {}
        for layer, moments in self.moments.items():
            rows, columns = torch.tril_indices(*moments.shape)
            packed[layer] = moments[rows, columns].cpu()
        return packed

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Takes up what :meth:`state_dict` gave, on the CPU."""
        self.moments = {}
        for layer, packed in state.items():
            size = round(((8 * packed.numel() + 1) ** 0.5 - 1) / 2)
            rows, columns = torch.tril_indices(size, size)
            moments = torch.zeros(size, size, dtype=torch.float64)
            moments[rows, columns] = packed
            moments[columns, rows] = packed
            self.moments[layer] = moments


def _symmetric(matrix: Tensor) -> Tensor:
    """The lower triangle mirrored: symmetric to the bit, so that half of it is all there is to keep."""
    return matrix.tril() + matrix.tril(-1).T


def _removable(past: Tensor, keys: Tensor, weights: Sequence[float]) -> Tensor:
    """What [d_k, d_k] of ``P`` goes with keys [d_k, n], one after the other, each at most at its weight.

    With ``P = B B^T`` and ``w = B^+ k``, what of a key lies in the range of ``P`` is ``B w``, and ``P - c B w w^T B^T =
    B (I - c w w^T) B^T`` is positive semidefinite as long as the small matrix is. Keys go one by one from it, in a
    basis of all ``w``, so no rounding of ``P`` comes between them; its eigenvalues are found once for all.
    """
    values, vectors = torch.linalg.eigh(past)
    held = values > TINY * values[-1].clamp_min(0)
    scale = values[held].sqrt()
    basis, coordinates = torch.linalg.qr((vectors[:, held] / scale).T @ keys)
    identity = torch.eye(len(coordinates), dtype=past.dtype, device=past.device)
    left = identity
    for w, weight in zip(coordinates.T, weights, strict=True):
        left = left - _rank_one(left, w, weight)
    spread = (vectors[:, held] * scale) @ basis
    return spread @ (identity - left) @ spread.T


def _rank_one(matrix: Tensor, vector: Tensor, weight: float) -> Tensor:
    """``c u u^T`` with ``u`` what of the vector lies in the range of the matrix ``M``, and ``c`` at most the weight.

    ``M - c u u^T`` is positive semidefinite as long as ``c <= 1 / (u^T M^+ u)``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    held = vectors[:, values > TINY]
    along = held.T @ vector
    reach = float((along.square() / values[values > TINY]).sum())
    inside = held @ along
    return min(weight, 1 / max(reach, 1e-300)) * torch.outer(inside, inside)
