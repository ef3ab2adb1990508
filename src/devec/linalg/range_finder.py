"""The leading rows of a matrix that is given by its products alone."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from devec.linalg.precision import full_precision

# Range finder. Adapters' products have slowly falling spectra: with a quarter more columns than
# asked for and four iterations the error stays below 1.005 times the least on Gaussian factors, at
# every rank tried (three iterations: 1.008, two: 1.016).
_SEED = 0
_OVERSAMPLING = 16
_ITERATIONS = 4


@runtime_checkable
class LinearOperator(Protocol):
    """A matrix of which only products are at hand."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n)."""

    def __matmul__(self, V: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]: ...

    def adjoint(self, Q: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """The transposed matrix times Q."""


@full_precision
def leading_row_space(matrix: LinearOperator, rank: int, like: Tensor) -> Float[Tensor, "n size"]:
    """Orthonormal columns that span the leading right singular vectors of a matrix, nearly.

    Randomised subspace iteration from a fixed seed, so that the same call gives the same result.

    Args:
        matrix: The matrix.
        rank: How many singular vectors are wanted.
        like: A tensor of the precision and on the device to compute in.

    Returns:
        A basis of a quarter more columns than asked for, as far as there are so many.

    Cost: four products with the matrix and four with its transpose, each by that many columns.

    Reference: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, Algorithm 4.4.
    """
    n, shorter = matrix.shape[1], min(matrix.shape)
    size = min(rank + max(_OVERSAMPLING, rank // 4), shorter)
    generator = torch.Generator().manual_seed(_SEED)
    V = orthonormal_basis(torch.randn(n, size, generator=generator).to(like))
    # As many as the shorter side need not lead: any of them reach the whole range.
    for _ in range(_ITERATIONS if size < shorter else 0):
        V = orthonormal_basis(matrix.adjoint(orthonormal_basis(matrix @ V)))
    return V


@full_precision
def orthonormal_basis(columns: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Orthonormal basis of the columns."""
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q
