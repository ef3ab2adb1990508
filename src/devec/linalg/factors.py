"""Linear algebra of a product of two thin factors, without ever forming the product.

With ``B`` of shape (m, r), ``A`` of shape (r, n) and small ``r``, every function costs
O((m + n)·r²).

All functions compute in float64 if the device supports it, whatever the condition of the factors:
roundoff perturbs the basis of a weak direction by eps times the condition number, and thresholds
are applied to these bases. `devec.linalg.batched` handles many well-conditioned factors at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from devec.errors import IncompatibleError
from devec.linalg.dtypes import RANK_RTOL, basis_dtype, working_dtype
from devec.linalg.precision import full_precision
from devec.linalg.threads import shared_executor

# Gram matrices square condition numbers. Up to the first loss of orthogonality one Newton-Schulz
# step restores all digits; beyond it QR is used instead. Below the second no step is needed.
_LARGEST_GRAM_LOSS = 1e-8
_NEGLIGIBLE_LOSS = 1e-13

# Singular values of a product below this many roundings of its terms are set to zero.
_ROUNDINGS_OF_ZERO = 10

# Rows of length 1 are nearly dependent if their smallest squared singular value is below this.
_SMALLEST_SQUARE = 0.1

# Smaller matrices are decomposed in less time than a thread takes to start.
_PARALLEL_ROWS = 64


class ProductSVD(NamedTuple):
    """Singular value decomposition ``U · diag(S) · Vh`` of a product of thin factors.

    Attributes:
        U: Left singular vectors in columns, shape (m, ρ).
        S: Singular values, descending, shape (ρ,).
        Vh: Right singular vectors in rows, shape (ρ, n).
    """

    U: Float[Tensor, "m rho"]
    S: Float[Tensor, " rho"]
    Vh: Float[Tensor, "rho n"]


class ColumnSpace(NamedTuple):
    """Column space of a product of thin factors.

    Attributes:
        U: Left singular vectors, an orthonormal basis in columns, shape (m, ρ).
        S: Singular values, descending, shape (ρ,).
    """

    U: Float[Tensor, "m rho"]
    S: Float[Tensor, " rho"]


@full_precision
def eig(
    matrices: Float[Tensor, "*batch r r"],
) -> tuple[Complex[Tensor, "*batch r"], Complex[Tensor, "*batch r r"]]:
    """Eigenvalues, in no order, and right eigenvectors of matrices on the CPU, in parallel."""
    threads = torch.get_num_threads()
    if threads == 1 or matrices.ndim != 3 or matrices.shape[-1] < _PARALLEL_ROWS:
        values, vectors = torch.linalg.eig(matrices)
        return values, vectors
    # several threads in one decomposition wait for each other longer than they compute
    results = list(shared_executor("eig", threads, 1).map(torch.linalg.eig, matrices))
    return torch.stack([values for values, _ in results]), torch.stack([V for _, V in results])


@full_precision
def product_svd(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> ProductSVD:
    """Thin singular value decomposition of ``B · A``.

    With the thin QR decompositions B = Q_B·R_B and Aᵀ = Q_A·R_A and the SVD of the core
    R_B·R_Aᵀ = U'·S·V'ᵀ, the decomposition is (Q_B·U')·S·(Q_A·V')ᵀ.

    Args:
        B: Left factor, shape (m, r), any floating dtype.
        A: Right factor, shape (r, n), any floating dtype.

    Returns:
        All ``min(m, r, n)`` singular triplets in float64 (float32 on devices without it), values
        descending. Exact to rounding; values at the level of rounding are zero but not removed.

    Raises:
        IncompatibleError: If a factor holds NaN or infinity.

    Cost: O((m + n)·r² + r³).

    Reference: Golub and Van Loan 2013, "Matrix Computations", §8.6 and §5.2.

    Example:
        >>> import torch
        >>> from devec.linalg.factors import product_svd
        >>> _ = torch.manual_seed(0)
        >>> B, A = torch.randn(50, 4), torch.randn(4, 30)
        >>> U, S, Vh = product_svd(B, A)
        >>> U.shape, S.shape, Vh.shape
        (torch.Size([50, 4]), torch.Size([4]), torch.Size([4, 30]))
        >>> torch.allclose(U * S @ Vh, (B @ A).double(), atol=1e-4)
        True
    """
    dtype = basis_dtype(B.device)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = core_svd(R_B, R_A)
    return ProductSVD(Q_B @ U, S, Vh @ Q_A.mT)


@full_precision
def column_space(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> ColumnSpace:
    """Orthonormal basis of the column space of ``B · A``, with the singular values.

    B·A = U·diag(S)·Vh, without Vh. The subspace depends on the product alone, not on its
    factorisation: for any invertible G the factors ``(B·G, G⁻¹·A)`` give the same one.

    Args:
        B: Left factor, shape (m, r), any floating dtype.
        A: Right factor, shape (r, n), any floating dtype.

    Returns:
        U of shape (m, ρ) with orthonormal columns and S of shape (ρ,), descending, in float64
        (float32 on devices without it). ρ is the numerical rank: the number of singular values
        above 1e-6 of the largest (1e-12 for float64 factors), 0 for a zero product. Exact to
        rounding.

    Raises:
        IncompatibleError: If a factor holds NaN or infinity.

    Cost: O((m + n)·r² + r³).

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 4 and 6, on factors.

    Example:
        >>> import torch
        >>> from devec.linalg.factors import column_space
        >>> _ = torch.manual_seed(0)
        >>> B, A, G = torch.randn(50, 4), torch.randn(4, 30), torch.eye(4) + torch.ones(4, 4)
        >>> U, V = column_space(B, A).U, column_space(B @ G, torch.linalg.inv(G) @ A).U
        >>> torch.allclose(U @ U.mT, V @ V.mT, atol=1e-3)
        True
    """
    dtype = basis_dtype(B.device)
    rtol = RANK_RTOL[working_dtype(B, A)]
    gram = _column_gram(A.to(dtype).mT)  # before B is converted: one large temporary at a time
    B = B.to(dtype)
    return _column_space_by_gram(B, gram) or _column_space_by_qr(B, A.to(dtype), rtol)


def _column_gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of the columns."""
    return matrix.mT @ matrix


def _column_space_by_gram(B: Tensor, gram: Tensor) -> ColumnSpace | None:
    """Column space of full rank by matrix products alone; None if that would cost accuracy."""
    # With gram = AAᵀ = L·Lᵀ, ΔW·ΔWᵀ = (B·L)(B·L)ᵀ, so the eigenvectors of (B·L)ᵀ(B·L) = V·S²·Vᵀ
    # give U = B·L·V·S⁻¹. Rounding in L, V and S does not change the span of U, which is that of B;
    # a Newton-Schulz step, U·(3 - UᵀU)/2, restores its orthogonality.
    L, info = torch.linalg.cholesky_ex(gram)
    if int(info) or B.shape[0] < B.shape[1]:
        return None
    gram_B = _column_gram(B)
    if not bool(gram_B.isfinite().all()):
        return None
    values, V = torch.linalg.eigh(L.mT @ gram_B @ L)
    if values.numel() == 0 or not values[0] > 0:
        return None
    # relative to the factors: they may be large although their product is not
    loss = float(torch.finfo(B.dtype).eps * gram_B.norm() * gram.norm() / values[0])
    if not loss < _LARGEST_GRAM_LOSS:
        return None
    S = values.sqrt().flip(0)
    U = B @ (L @ V.flip(1) / S)
    if loss > _NEGLIGIBLE_LOSS:
        U = U @ (1.5 * torch.eye(len(S)).to(U) - 0.5 * _column_gram(U))
    return ColumnSpace(U, S)


def _column_space_by_qr(B: Tensor, A: Tensor, rtol: float) -> ColumnSpace:
    """Column space by Householder QR of both factors and the SVD of their core."""
    Q, R_B = torch.linalg.qr(B)
    R_A = torch.linalg.qr(A.mT, mode="r").R
    U, S, _ = core_svd(R_B, R_A)
    rank = numerical_rank(S, rtol)
    return ColumnSpace(Q @ U[:, :rank], S[:rank])


@full_precision
def core_svd(R_B: Float[Tensor, "p r"], R_A: Float[Tensor, "q r"]) -> ProductSVD:
    """SVD of the core R_B · R_Aᵀ, with singular values at the level of rounding set to zero."""
    core = R_B @ R_A.mT
    if not bool(core.isfinite().all()):
        raise IncompatibleError(
            "the factors hold NaN or infinity, or numbers whose products are too large for float64"
        )
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    # an error of eps·‖b_j‖ in column j of B changes the product by eps·Σ_j ‖b_j‖·‖a_j‖
    terms = (R_B.norm(dim=0) * R_A.norm(dim=0)).sum()
    return ProductSVD(
        U, torch.where(S > _ROUNDINGS_OF_ZERO * torch.finfo(S.dtype).eps * terms, S, 0), Vh
    )


@full_precision
def has_nearly_dependent_rows(A: Float[Tensor, "r n"]) -> bool:
    """Whether the rows, scaled to length 1, have a singular value below about a third."""
    lengths = torch.linalg.vector_norm(A, dim=1, keepdim=True)
    rows = A / torch.where(lengths > 0, lengths, 1)
    identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
    gram = rows @ rows.mT + identity * (lengths == 0)
    return bool(torch.linalg.cholesky_ex(gram - _SMALLEST_SQUARE * identity).info)


def numerical_rank(S: Float[Tensor, " k"], rtol: float) -> int:
    """The number of singular values above `rtol` times the largest; 0 for a zero matrix."""
    if S.numel() == 0:
        return 0
    return int((S > rtol * S[0]).logical_and(S > 0).sum())


def rank_for_energy(S: Float[Tensor, " k"], energy: float, norm: float | None = None) -> int:
    """The smallest rank that keeps this fraction of the squared norm, by default that of S."""
    squares = S.square()
    total = squares.sum() if norm is None else norm * norm
    # compare the tail: in the head, rounding would swallow the last 1e-12 of the energy
    tail = squares.flip(0).cumsum(0).flip(0)
    return int((tail > (1 - energy) * total).sum())


def norm(tensor: Tensor) -> float:
    """Euclidean norm of all entries, summed in the basis precision, where no square overflows."""
    return float(torch.linalg.vector_norm(tensor, dtype=basis_dtype(tensor.device)))


@full_precision
def product_norm(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> float:
    """Frobenius norm of ``B · A``, with an error of a few float64 roundings of ‖B‖·‖A‖."""
    dtype = basis_dtype(B.device)
    R_B = torch.linalg.qr(B.to(dtype), mode="r").R
    R_A = torch.linalg.qr(A.to(dtype).mT, mode="r").R
    return float(torch.linalg.matrix_norm(R_B @ R_A.mT))


@full_precision
def product_inner(
    B1: Float[Tensor, "m r1"],
    A1: Float[Tensor, "r1 n"],
    B2: Float[Tensor, "m r2"],
    A2: Float[Tensor, "r2 n"],
) -> float:
    """Frobenius inner product ⟨B1·A1, B2·A2⟩ = tr((B1ᵀB2)(A2A1ᵀ)), in the basis precision."""
    dtype = basis_dtype(B1.device)
    left = B1.to(dtype).mT @ B2.to(dtype)
    right = A1.to(dtype) @ A2.to(dtype).mT
    return float((left * right).sum())
