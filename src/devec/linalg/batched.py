"""Orthonormal bases of the column spaces of many thin products at once, by matrix products alone.

Modules of one shape are stacked along a leading axis. Products of tall matrices run in the working
precision, which is fastest; r × r matrices are processed in float64. Products for which this could
cost accuracy are reported as not sound; use `devec.linalg.factors.column_space` for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from devec.linalg.buffers import empty, matmul
from devec.linalg.dtypes import RANK_RTOL, basis_dtype, on_float64_device, to_float64, working_dtype
from devec.linalg.factors import core_svd
from devec.linalg.precision import full_precision

# Largest loss of orthogonality of the first pass, which the second pass squares; and the largest
# distance of entries of UᵀU from those of the identity that needs no second pass.
_LARGEST_FIRST_LOSS = 1e-2
_ORTHONORMALITY = {torch.float32: 9e-7, torch.float64: 1e-12}

# Float32 sums of this many products lose at most the last two digits. Sums over blocks of as many
# rows are added in float64. CPU kernels for wide factors sum in blocks themselves.
_BLOCK = 512
_BLOCK_OF_WIDE = 2048
_WIDE = 64

# XᵀX is symmetric: for wide X only the part on and above diagonal strips of this width is computed.
_STRIP = 64

# Range of squared column lengths in which the squares of entries neither underflow nor overflow.
_SAFE_SQUARES = {torch.float32: (1e-26, 1e36), torch.float64: (1e-280, 1e300)}

# A·Aᵀ has a single pass, whose loss passes on to the norms. Beyond this loss the product is
# computed in float64, which takes twice as long.
_LARGEST_LOSS_OF_NORMS = 1e-5

# A decomposition by Gram matrices may lose at most what rounding of its result to float32 loses.
_LARGEST_LOSS_OF_SVD = {torch.float32: 1e-6, torch.float64: 1e-8}


class ColumnBases(NamedTuple):
    """Column spaces of a stack of products B·A of full rank.

    Attributes:
        U: Orthonormal columns, in the precision of the factors.
        norms: ‖B·A‖_F.
        gram: A·Aᵀ, which gives the norm of C·A for any C.
        sound: Which products have full rank and are conditioned well enough for correct results;
            the entries of the others are meaningless.
    """

    U: Float[Tensor, "batch m r"]
    norms: Float[Tensor, " batch"]
    gram: Float[Tensor, "batch r r"]
    sound: Bool[Tensor, " batch"]


class FactoredSVD(NamedTuple):
    """A singular value decomposition ``(X·U) · diag(S) · (Vh·Y)`` with a tall X and a wide Y.

    Attributes:
        X: Shape (m, r).
        U: Shape (r, ρ).
        S: Singular values, descending.
        Vh: Shape (ρ, r).
        Y: Shape (r, n).
    """

    X: Float[Tensor, "m r"]
    U: Float[Tensor, "r rho"]
    S: Float[Tensor, " rho"]
    Vh: Float[Tensor, "rho r"]
    Y: Float[Tensor, "r n"]

    @full_precision
    def leading(self, rank: int) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k n"]]:
        """Balanced factors X·U·√S and √S·Vh·Y of the leading triplets."""
        root = self.S[:rank].sqrt()
        left, right = self.U[:, :rank] * root, root[:, None] * self.Vh[:rank]
        return self.X @ left.to(self.X), right.to(self.Y) @ self.Y


@full_precision
def factored_svd(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> FactoredSVD:
    """Singular value decomposition of ``B · A`` whose singular vectors are formed on request."""
    # With BᵀB = RᵀR and AAᵀ = LᵀL, the SVD R·Lᵀ = U·S·Vh of the core gives B·R⁻¹·U and Vh·L⁻ᵀ·A.
    # float64 factors, and those too ill-conditioned for Gram matrices, use Householder QR.
    precise = working_dtype(B, A) == torch.float64 or not B.shape[1]
    left, right = (None, None) if precise else (_well_conditioned(B), _well_conditioned(A.mT))
    if left is not None and right is not None:
        U, S, Vh = core_svd(left.triangle.R, right.triangle.R)
        return FactoredSVD(
            left.X, left.triangle.inverse @ U, S, Vh @ right.triangle.inverse.mT, right.X.mT
        )
    X, Y = (factor.to(basis_dtype(factor.device)) for factor in (B, A))
    X, R_B = torch.linalg.qr(X)
    Q_A, R_A = torch.linalg.qr(Y.mT)
    U, S, Vh = core_svd(R_B, R_A)
    return FactoredSVD(X, U, S, Vh, Q_A.mT)


class _Cholesky(NamedTuple):
    """Cholesky factor R with XᵀX = RᵀR, its inverse, and the loss of orthogonality in X·R⁻¹."""

    R: Tensor
    inverse: Tensor
    loss: Tensor


@full_precision
def column_bases(
    B: Float[Tensor, "batch m r"], A: Float[Tensor, "batch r n"], rtol: float | None = None
) -> ColumnBases:
    """Orthonormal bases of the column spaces of products, by Cholesky QR, repeated where needed.

    BᵀB = RᵀR gives U = B·R⁻¹, whose distance from orthonormality is roundoff times the squared
    condition number of B with its columns scaled to length 1. A second pass over U removes it.

    Args:
        B: Left factors, shape (batch, m, r), float32 or float64.
        A: Right factors, shape (batch, r, n), of the same dtype.
        rtol: Fraction of the largest singular value below which others count as rounding; by
            default `RANK_RTOL` of the dtype.

    Returns:
        The bases, with entries of UᵀU exact to 1e-6 (float32) or to rounding (float64), and the
        norms. A product is sound if four conditions hold: B with columns scaled to length 1 has a
        condition number up to about 100 (float32) or 1e6 (float64); A with rows scaled likewise has
        one up to about 1e5, more at low rank; squares of all entries stay in the range of the
        dtype; and no singular value of the product is below `rtol` times the largest.

    Cost: O((m + n)·r²) per product, all in matrix products.

    Reference: Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA
    44, Theorem 3.3.
    """
    dtype = B.dtype
    rtol = RANK_RTOL[dtype] if rtol is None else rtol
    gram = _symmetric(to_float64(_upper_gram(A.mT)))
    right = _cholesky(gram, dtype)
    if dtype == torch.float32 and bool((right.loss >= _LARGEST_LOSS_OF_NORMS).any()):
        gram = _symmetric(_upper_gram(to_float64(A).mT))
        right = _cholesky(gram, gram.dtype)
    del A  # as large as a basis, and no longer needed; likewise B below
    first = _cholesky(_blocked_gram(B), dtype)
    sound = (first.loss < _LARGEST_FIRST_LOSS) & (right.loss < _LARGEST_LOSS_OF_NORMS)
    U = matmul(B, first.inverse.to(B))
    del B
    second = _blocked_gram(U)
    distance = _distance_from_identity(second)
    R, inverse = first.R, first.inverse
    if bool((sound & (distance > _ORTHONORMALITY[dtype])).any()):
        again = _cholesky(second, dtype)
        U = matmul(U, again.inverse.to(U))
        # otherwise B is too ill-conditioned, or the arithmetic coarser than declared (TF32)
        sound &= _distance_from_identity(_blocked_gram(U)) <= _ORTHONORMALITY[dtype]
        R, inverse = again.R @ R, inverse @ again.inverse
    core = R @ right.R.mT
    norms = torch.linalg.matrix_norm(core)
    # an upper bound of the spectral condition number; only the SVD below gives the exact value
    condition = norms * torch.linalg.matrix_norm(right.inverse.mT @ inverse)
    sound &= condition.isfinite()
    for index in (sound & (condition >= 1 / rtol)).nonzero()[:, 0].tolist():
        S = torch.linalg.svdvals(core[index])
        sound[index] = S[-1] > rtol * S[0]
    return ColumnBases(U, norms, gram, sound)


class _ConditionedFactor(NamedTuple):
    """A factor and the Cholesky factor of its Gram matrix."""

    X: Tensor
    triangle: _Cholesky


def _well_conditioned(X: Float[Tensor, "m r"]) -> _ConditionedFactor | None:
    """A factor in the lowest precision that its condition allows; None if there is none."""
    for dtype in _LARGEST_LOSS_OF_SVD if X.device.type != "mps" else ():
        converted = X.to(dtype)
        triangle = _Cholesky(
            *(part[0] for part in _cholesky(_blocked_gram(converted[None]), dtype))
        )
        if float(triangle.loss) < _LARGEST_LOSS_OF_SVD[dtype]:
            return _ConditionedFactor(converted, triangle)
    return None


def _distance_from_identity(gram: Tensor) -> Tensor:
    """The largest distance of an entry of each Gram matrix from the identity's."""
    return (gram - _identity(gram)).abs().amax(dim=(-2, -1))


def _identity(like: Tensor) -> Tensor:
    """The identity of the size, dtype and device of square matrices."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _blocked_gram(X: Float[Tensor, "batch m r"]) -> Float[Tensor, "batch r r"]:
    """XᵀX in float64, from sums over blocks of rows."""
    batch, m, r = X.shape
    longest = _BLOCK_OF_WIDE if r >= _WIDE and X.device.type == "cpu" else _BLOCK
    rows = next((n for n in range(min(longest, m), 0, -1) if m % n == 0), 1)
    if X.dtype == torch.float64 or m <= longest:
        return _symmetric(to_float64(_upper_gram(X)))
    if rows < longest // 8:  # no suitable block size divides m
        return _symmetric(_upper_gram(to_float64(X)))
    blocks = X.reshape(batch * (m // rows), rows, r)
    products = _upper_gram(blocks).reshape(batch, m // rows, r, r)
    return _symmetric(on_float64_device(products).sum(dim=1, dtype=torch.float64))


def _upper_gram(X: Float[Tensor, "batch m r"]) -> Float[Tensor, "batch r r"]:
    """XᵀX; for wide X only its upper triangle is meaningful."""
    r = X.shape[-1]
    if r <= _STRIP:
        return X.mT @ X
    result = empty((len(X), r, r), X.dtype, X.device)
    for start in range(0, r, _STRIP):
        strip = X[..., start : start + _STRIP]
        result[:, start : start + _STRIP, start:] = strip.mT @ X[..., start:]
    return result


def _symmetric(upper: Float[Tensor, "batch r r"]) -> Float[Tensor, "batch r r"]:
    """Symmetric matrices from the result of `_upper_gram`."""
    if upper.shape[-1] <= _STRIP:
        return upper
    return upper.triu() + upper.triu(1).mT


def _cholesky(gram: Tensor, dtype: torch.dtype) -> _Cholesky:
    """Cholesky factors of Gram matrices that were computed in the given precision."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    scale = squares.rsqrt()
    R, info = torch.linalg.cholesky_ex(scale[..., None] * gram * scale[..., None, :], upper=True)
    inverse = torch.linalg.solve_triangular(R, _identity(R).expand_as(R), upper=True)
    # ‖R⁻¹‖² is at most the product of the largest sums of rows and of columns
    sums = [inverse.abs().sum(dim=dim).amax(dim=-1) for dim in (-2, -1)]
    loss = torch.finfo(dtype).eps * sums[0] * sums[1]
    smallest, largest = _SAFE_SQUARES[dtype]
    inside = ((squares > smallest) & (squares < largest)).all(dim=-1)
    loss = torch.where((info == 0).to(loss.device) & loss.isfinite() & inside, loss, torch.inf)
    return _Cholesky(R / scale[..., None, :], scale[..., None] * inverse, loss)
