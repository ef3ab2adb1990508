"""Randomised range finder for a matrix that is only available through products."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from devec.linalg.precision import full_precision

# Products of adapters have slowly decaying spectra. With a quarter more columns than requested and
# four iterations the error stays below 1.005 times the optimum on Gaussian factors, at every rank
# tried (three iterations: 1.008, two: 1.016).
_SEED = 0
_OVERSAMPLING = 16
_ITERATIONS = 4


@runtime_checkable
class LinearOperator(Protocol):
    """A matrix that is only available through products with it and its transpose."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n)."""

    def __matmul__(self, V: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]: ...

    def adjoint(self, Q: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """The transposed matrix times Q."""


@full_precision
def leading_row_space(matrix: LinearOperator, rank: int, like: Tensor) -> Float[Tensor, "n size"]:
    """Orthonormal basis that nearly contains the `rank` leading right singular vectors."""
    # Randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, Algorithm
    # 4.4), in the precision and on the device of `like`. The seed is fixed: equal calls give equal
    # results. The cost is four products with the matrix and four with its transpose.
    n, shorter = matrix.shape[1], min(matrix.shape)
    size = min(rank + max(_OVERSAMPLING, rank // 4), shorter)
    generator = torch.Generator().manual_seed(_SEED)
    V = orthonormal_basis(torch.randn(n, size, generator=generator).to(like))
    # Any full set of columns spans the whole range without iterations.
    for _ in range(_ITERATIONS if size < shorter else 0):
        V = orthonormal_basis(matrix.adjoint(orthonormal_basis(matrix @ V)))
    return V


@full_precision
def orthonormal_basis(columns: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Orthonormal basis of the span of the columns."""
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q
