"""Consolidated memory: the keys of all past edits, summed into the metric of later solves at constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editlab.utils.validation import above_zero, decays

TINY = 1e-9
"""Fraction of the largest eigenvalue under which an eigenvalue counts as 0."""


class Released(NamedTuple):
    """Keys at one layer of facts that a batch edits again, which leave the past keys."""

    keys: Tensor
    """the keys, [d_k, n]"""
    ages: Tensor
    """long [n]: number of batches kept since the one that edited the fact before"""
    indices: Tensor
    """long [n]: index in the batch of each key's fact"""
    fractions: Tensor
    """float64 [n]: fraction of the past keys' weight that each was added with"""


class PastKeys:
    """Past keys: for each layer ``P = sum over batches of forget^age * (weight * sum k k^T)``, float64 [d_k, d_k].

    In the metric ``C + P`` a later update pays ``weight * ||delta k||^2`` for moving a past edit's output. With
    ``weight = 1 / slack`` and no forgetting a sequence of batches is one joint batch over all of their edits, since
    both minimize the same quadratic (recursive least squares).

    Args:
        weight: weight of each past key.
        forget: factor on the sum after each batch, 0 to 1; 1 forgets nothing.

    Raises:
        UserError: The weight is not positive, or ``forget`` is out of range.
    """

    def __init__(self, weight: float, forget: float = 1.0) -> None:
        above_zero("MemoryReplay", past_weight=weight)
        decays("MemoryReplay", forget=forget)
        self.weight = weight
        self.forget = forget
        self.moments: dict[int, Tensor] = {}

    def fraction(self, firm_slack: float) -> float:
        """The fraction of its weight with which a batch enters whose solve added ``firm_slack`` to each slack.

        A past key of weight w stands for a constraint of slack 1 / w. With slack ``1 / w + firm_slack`` its weight is
        ``w / (1 + w firm_slack)``, at which a sequence of batches remains one joint batch.
        """
        return 1 / (1 + self.weight * firm_slack)

    def add(self, layer: int, keys: Tensor, context_keys: Tensor, context_weight: float, fraction: float = 1.0) -> None:
        """Adds one batch.

        Args:
            layer: number of the layer.
            keys: keys of the batch's facts, [d_k, n].
            context_keys: keys of the context tokens of their prompts, [d_k, m].
            context_weight: weight of each context key.
            fraction: factor on the weight of the facts' keys (:meth:`fraction`).
        """
        # On the CPU, as in a resumed run: on another device the next removal might round differently.
        new = _symmetric(self.weight * fraction * keys @ keys.T + context_weight * context_keys @ context_keys.T).cpu()
        past = self.moments.get(layer)
        self.moments[layer] = new if past is None else self.forget * past + new

    def remove(self, layer: int, keys: Tensor, ages: Tensor, fractions: Sequence[float] | None = None) -> None:
        """Removes keys [d_k, n] that were added ``ages`` [n] batches before the last one.

        ``fractions`` are those that they were added with; default: 1.

        A key may have moved since then if layers below are edited. So in its direction as much is removed as leaves
        ``P`` positive semidefinite, and at most what was added. It costs one eigendecomposition of ``P``.
        """
        past = self.moments.get(layer)
        if past is None or not keys.numel():
            return
        parts = fractions or [1.0] * len(ages)
        weights = [self.weight * part * self.forget**age for part, age in zip(parts, ages.tolist(), strict=True)]
        self.moments[layer] = past - _symmetric(_removable(past, keys.to(past), weights))

    def state_dict(self) -> dict[int, Tensor]:
        """Layer -> its packed sum (:func:`packed`)."""
        return packed(self.moments)

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Loads what :meth:`state_dict` returned, on the CPU."""
        self.moments = unpacked(state)


def packed(matrices: dict[int, Tensor]) -> dict[int, Tensor]:
    """Layer -> the lower triangle, row by row, float64 [d_k (d_k + 1) / 2]: half of the symmetric matrix."""
    triangles = {}
    for layer, matrix in matrices.items():
        rows, columns = torch.tril_indices(*matrix.shape)
        triangles[layer] = matrix[rows, columns].cpu()
    return triangles


def unpacked(triangles: dict[int, Any]) -> dict[int, Tensor]:
    """Layer -> the symmetric matrix [d_k, d_k] that :func:`packed` returned half of, on the CPU."""
    matrices = {}
    for layer, triangle in triangles.items():
        size = round(((8 * triangle.numel() + 1) ** 0.5 - 1) / 2)
        rows, columns = torch.tril_indices(size, size)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        matrix[rows, columns] = triangle
        matrix[columns, rows] = triangle
        matrices[layer] = matrix
    return matrices


def _symmetric(matrix: Tensor) -> Tensor:
    """Mirrors the lower triangle: the result is symmetric to the bit, so half of it is enough to save."""
    return matrix.tril() + matrix.tril(-1).T


def _removable(past: Tensor, keys: Tensor, weights: Sequence[float]) -> Tensor:
    """The part [d_k, d_k] of ``P`` to remove for keys [d_k, n], one after the other, each at most at its weight.

    With ``P = B B^T`` and ``w = B^+ k``, the part of a key in the range of ``P`` is ``B w``, and ``P - c B w w^T B^T =
    B (I - c w w^T) B^T`` is positive semidefinite as long as the small matrix is. Keys are removed one by one from that
    matrix, in a basis of all ``w``, so ``P`` is decomposed only once and not rounded in between.
    """
    values, vectors = torch.linalg.eigh(past)
    nonzero = values > TINY * values[-1].clamp_min(0)
    scale = values[nonzero].sqrt()
    basis, coordinates = torch.linalg.qr((vectors[:, nonzero] / scale).T @ keys)
    identity = torch.eye(len(coordinates), dtype=past.dtype, device=past.device)
    remaining = identity
    for w, weight in zip(coordinates.T, weights, strict=True):
        remaining = remaining - _rank_one(remaining, w, weight)
    expand = (vectors[:, nonzero] * scale) @ basis
    return expand @ (identity - remaining) @ expand.T


def _rank_one(matrix: Tensor, vector: Tensor, weight: float) -> Tensor:
    """``c u u^T`` with ``u`` the vector's projection on the range of the matrix ``M``, and ``c`` at most the weight.

    ``M - c u u^T`` is positive semidefinite as long as ``c <= 1 / (u^T M^+ u)``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    basis = vectors[:, values > TINY]
    along = basis.T @ vector
    reach = float((along.square() / values[values > TINY]).sum())
    inside = basis @ along
    return min(weight, 1 / max(reach, 1e-300)) * torch.outer(inside, inside)
