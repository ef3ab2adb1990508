"""ΔW of a DoRA as a matrix: products with it, and blocks of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from devec.linalg.dtypes import BLOCK_ROWS, basis_dtype
from devec.linalg.precision import full_precision


@dataclass(frozen=True, eq=False)
class DeltaMatrix:
    """The matrix B·A + diag(g)·W + W·diag(h); at most 128 rows are formed at a time.

    Attributes:
        B: Left factor, scaling included.
        A: Right factor.
        W: Base weight.
        g: Gains of the rows; None for zero.
        h: Gains of the columns; None for zero.
    """

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    W: Float[Tensor, "out in"]
    g: Float[Tensor, " out"] | None
    h: Float[Tensor, " in"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.W.shape[0], self.W.shape[1]

    @full_precision
    def __matmul__(self, V: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        result = self.B @ (self.A @ V)
        if self.g is not None:
            result += self.g[:, None] * (self.W @ V)
        if self.h is not None:
            result += self.W @ (self.h[:, None] * V)
        return result

    @full_precision
    def adjoint(self, Q: Float[Tensor, "out k"]) -> Float[Tensor, "in k"]:
        """The transposed matrix times Q."""
        result = self.A.mT @ (self.B.mT @ Q)
        if self.g is not None:
            result += self.W.mT @ (self.g[:, None] * Q)
        if self.h is not None:
            result += self.h[:, None] * (self.W.mT @ Q)
        return result

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and the blocks they select, in the basis precision."""
        dtype = basis_dtype(self.W.device)
        A = self.A.to(dtype)
        for start in range(0, len(self.W), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            W, block = self.W[rows].to(dtype), self.B[rows].to(dtype) @ A
            if self.g is not None:
                block += self.g[rows, None].to(dtype) * W
            if self.h is not None:
                block += W * self.h.to(dtype)
            yield rows, block

    @full_precision
    def norm(self) -> float:
        """Frobenius norm, from the entries."""
        return math.sqrt(sum(float(block.square().sum()) for _, block in self.blocks()))

    @full_precision
    def distance(self, B: Float[Tensor, "out k"], A: Float[Tensor, "k in"]) -> float:
        """Frobenius norm of the matrix minus B·A, from the entries."""
        A = A.to(basis_dtype(A.device))
        residuals = (block.addmm_(B[r].to(A), A, alpha=-1) for r, block in self.blocks())
        return math.sqrt(sum(float(residual.square().sum()) for residual in residuals))
