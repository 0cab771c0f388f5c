"""The preservation metric of the closed form: how much an update pays for moving the layer's output at a key."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from editlab.errors import EditLabError, UserError
from editlab.lm.memory import lacks_memory, release
from editlab.lm.precision import widened

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preservation:
    """A preservation metric ``C``, stored as the factor that whitens keys: ``C^-1 = T^T T``, whitened keys ``T K``.

    ``columns`` are whitened extra keys ``B`` that were added since the factor was computed, so that the metric is
    ``C`` plus a weighted sum of ``k k^T``. By Woodbury's identity they cost an m x m solve and no new factorization.

    A metric of several blocks is block-diagonal, and its factor holds one matrix for each block. With ``d`` features in
    a block, the d_k features of a key are those of the first block, then those of the second, and so on.
    """

    factor: Tensor
    """Lower Cholesky factor L of C, or a basis U of a subspace (then T = U^T), float64 [d_k, r]. The basis is
    orthonormal if the metric is the identity on the subspace. Of a metric of blocks it is [blocks, d, d], where columns
    of 0 stand for directions outside a basis."""
    is_basis: bool = False
    """Whether ``factor`` is a basis (AlphaEdit's null space) rather than a Cholesky factor."""
    columns: Tensor | None = None
    """Whitened extra keys, float64 [r, m], already scaled by the square root of their weight."""

    @property
    def device(self) -> torch.device:
        """Device of the metric, on which :func:`~editlab.solver.closed_form.solve` works."""
        return self.factor.device

    @property
    def bytes(self) -> int:
        """Bytes of the factor, a number that does not change while columns are added."""
        return self.factor.numel() * self.factor.element_size()

    def to(self, device: torch.device) -> Preservation:
        """The same metric on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        return Preservation(self.factor.to(device), self.is_basis, columns)

    @classmethod
    def from_moments(
        cls,
        moments: Tensor,
        weight: float = 1.0,
        ridge: float = 1e-6,
        device: torch.device | None = None,
        identity: float = 0.0,
    ) -> Preservation:
        """The metric ``weight * C0 + identity * I`` plus ``ridge`` times C0's mean eigenvalue, factored once.

        One matrix [d_k, d_k] is allocated on the device and becomes the factor. If the device lacks memory for it, the
        metric is computed on the CPU and stays there.

        Args:
            moments: second moments of keys C0 = E[k k^T], [d_k, d_k], symmetric; or those of blocks, [blocks, d, d].
            weight: lambda, the number of ordinary tokens that C0 counts as.
            ridge: fraction of the mean eigenvalue that is added to the diagonal, so that the metric is positive
                definite in directions that the text never used.
            device: device of the metric; default: that of the moments.
            identity: mu, the weight of the identity in the units of a key's square; unlike the ridge it does not scale
                with C0.

        Raises:
            EditLabError: The matrix is not finite, or not positive definite even with the ridge.
        """
        return _where_it_fits(
            device or moments.device, lambda there: cls._factored(moments, weight, ridge, identity, there)
        )

    @classmethod
    def _factored(
        cls, moments: Tensor, weight: float, ridge: float, identity: float, device: torch.device
    ) -> Preservation:
        c = _copied(moments, device).mul_(weight)
        if not torch.isfinite(c.sum()):  # testing each element would take memory for a third such matrix
            raise EditLabError(
                "The second moments hold values that are not finite: delete the cached file, and they are recomputed."
            )
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(ridge * diagonal.mean() + identity)
        factor, failed = _cholesky_in_place(c)
        if failed:
            raise EditLabError(
                f"The second moments are not positive definite with a ridge of {ridge:g}: raise moments.tokens, "
                "or the ridge."
            )
        return cls(factor)

    @classmethod
    def null_space(
        cls, moments: Tensor, threshold: float, device: torch.device | None = None, identity: float = 1.0
    ) -> Preservation:
        """AlphaEdit's metric: the identity on the span of C0's eigenvectors with eigenvalues under ``threshold``.

        Outside that span an update is zero (Fang et al. 2024, arXiv:2410.02355).

        Args:
            moments: as for :meth:`from_moments`.
            threshold: an absolute number in the units of C0, as in the paper.
            device: as for :meth:`from_moments`.
            identity: weight of the identity.

        Raises:
            UserError: No eigenvalue lies under the threshold.
        """
        return _where_it_fits(
            device or moments.device, lambda there: cls._null_space(moments, threshold, identity, there)
        )

    @classmethod
    def _null_space(cls, moments: Tensor, threshold: float, identity: float, device: torch.device) -> Preservation:
        values, vectors = torch.linalg.eigh(widened(moments, device))
        inside = values < threshold
        if not bool(inside.any()):
            raise UserError(
                f"No eigenvalue of the second moments is under {threshold:g}, so the null space is empty: raise the "
                f"threshold (they run from {float(values.min()):.3g} to {float(values.max()):.3g})."
            )
        # Blocks have null spaces of different dimensions, so theirs keep the other directions, as columns of 0.
        basis = vectors[:, inside] if moments.dim() == 2 else vectors * inside[:, None]
        return cls(basis.contiguous().div_(identity**0.5), is_basis=True)

    def whiten(self, keys: Tensor) -> Tensor:
        """Whitened keys ``T K`` of keys ``K``: [d_k, n] -> [r, n], float64, on the metric's device."""
        keys = self._in_blocks(widened(keys, self.device))
        if self.is_basis:
            return _flat(self.factor.mT @ keys)
        return _flat(torch.linalg.solve_triangular(self.factor, keys, upper=False))

    def unwhiten(self, whitened: Tensor) -> Tensor:
        """``T^T A`` of whitened keys ``A``: [r, n] -> [d_k, n].

        ``unwhiten(whiten(K))`` is ``C^-1 K`` if no columns were added.
        """
        whitened = self._in_blocks(whitened)
        if self.is_basis:
            return _flat(self.factor @ whitened)
        return _flat(torch.linalg.solve_triangular(self.factor.mT, whitened, upper=True))

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """Rows [d_k or r, n] as the factor's blocks multiply them: [blocks, d, n], or unchanged."""
        return rows if self.factor.dim() == 2 else rows.reshape(*self.factor.shape[:2], -1)

    def inverse_times(self, keys: Tensor) -> Tensor:
        """``C^-1 K`` of keys ``K`` with the added columns accounted for: [d_k, n] -> [d_k, n], float64."""
        return self.unwhiten(self.correct(self.whiten(keys)).contiguous())

    def plus(self, keys: Tensor, weight: float | Tensor = 1.0) -> Preservation:
        """The metric ``C + sum_i weight_i k_i k_i^T`` for keys [d_k, m], as a new object.

        Once there are more columns than half the dimension, they are folded into a new factor, so that memory and time
        stay bounded however long the sequence of edits is. A metric of blocks keeps all columns: a sum of ``k k^T``
        couples blocks, so it does not fit into their factors.
        """
        if keys.shape[1] == 0:
            return self
        scale = torch.as_tensor(weight, dtype=torch.float64, device=self.device).sqrt()
        columns = self.whiten(keys) * scale
        if self.columns is not None:
            columns = torch.cat([self.columns, columns], dim=1)
        if self.factor.dim() == 3 or columns.shape[1] <= self.factor.shape[1] // 2:
            return Preservation(self.factor, self.is_basis, columns)
        return self._folded(columns @ columns.T)

    def plus_moments(self, moments: Tensor) -> Preservation:
        """The metric ``C + P`` for a symmetric positive semidefinite ``P`` [d_k, d_k], as a new object.

        If this metric's device lacks memory for the new one, the new one is on the CPU.

        Raises:
            EditLabError: The sum is not positive definite.
        """
        return _where_it_fits(self.device, lambda there: self.to(there)._plus_moments(moments))

    def _plus_moments(self, moments: Tensor) -> Preservation:
        assert self.factor.dim() == 2  # a consolidated memory is refused for a metric of blocks
        extra = self.whiten(moments)
        extra = self.whiten(extra.T)  # the name is reused, so that the first product is freed
        if self.columns is not None:
            extra = extra + self.columns @ self.columns.T
        extra = extra + extra.T
        return self._folded(extra.div_(2))

    def _folded(self, extra: Tensor) -> Preservation:
        """The metric whose whitened form is ``I + extra``, with a factor of its own; ``extra`` is overwritten."""
        # C + P = L (I + X) L^T = (L F)(L F)^T with F the factor of the bracket; a basis is multiplied by F alike.
        extra.diagonal().add_(1)
        inner, failed = _cholesky_in_place(extra)
        if failed:
            raise EditLabError("The metric with the added keys is not positive definite: lower the weight of the keys.")
        if self.is_basis:
            # T = F^-1 U^T, hence T^T = U F^-T: no longer orthonormal, but T still whitens keys.
            turned = torch.linalg.solve_triangular(inner, self.factor.T, upper=False).T
            return Preservation(turned.contiguous(), True)
        return Preservation(self.factor @ inner, False)

    def correct(self, whitened: Tensor) -> Tensor:
        """``(I + B B^T)^-1 A`` of whitened keys ``A``: accounts for the added columns ``B`` (Woodbury)."""
        if self.columns is None:
            return whitened
        b = self.columns
        small = torch.eye(b.shape[1], dtype=b.dtype, device=b.device) + b.T @ b
        return whitened - b @ torch.linalg.solve(small, b.T @ whitened)


def _flat(rows: Tensor) -> Tensor:
    """Rows of all blocks, [blocks, d, n] -> [blocks d, n]; a matrix is returned as it is."""
    return rows if rows.dim() == 2 else rows.flatten(0, 1)


def _where_it_fits(device: torch.device, make: Callable[[torch.device], Preservation]) -> Preservation:
    """The metric that ``make`` returns for the device, or for the CPU if the device lacks memory."""
    try:
        return make(device)
    except Exception as error:
        if device.type == "cpu" or not lacks_memory(error):
            raise
    release()
    log.warning("The memory of %s does not hold a metric: this layer is solved on the CPU, which takes longer", device)
    return make(torch.device("cpu"))


def _copied(matrix: Tensor, device: torch.device) -> Tensor:
    """A float64 copy of a matrix on a device, which never shares memory with the original."""
    moved = widened(matrix, device)
    return moved.clone() if moved is matrix else moved


def _cholesky_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower Cholesky factor in the matrix's own memory, and whether the factorization failed."""
    info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return factor, bool(info.any())
