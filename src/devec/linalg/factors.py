"""Linear algebra of a product of two thin factors, without ever forming the product.

All functions take plain tensors and know nothing of adapters. With ``B`` of shape (m, r) and ``A``
of shape (r, n), ``r`` small, everything costs O((m + n) r²).

What is here computes in float64 where the device has it, whatever the condition of the factors: the
basis of a weak direction is perturbed by eps times the condition number, and thresholds are cut on
these bases. `devec.linalg.batched` is for many well-conditioned factors at once.
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

# The Gram route squares condition numbers. Up to this loss of orthogonality one polishing step
# restores all digits; beyond it, the route is not taken. Below the second figure there is no loss.
_LARGEST_GRAM_LOSS = 1e-8
_NEGLIGIBLE_LOSS = 1e-13

# Singular values of a product below this many roundings of its terms are rounding themselves.
_ROUNDINGS_OF_ZERO = 10

# Squares of singular values of rows of length 1 below which the rows nearly depend on each other.
_SMALLEST_SQUARE = 0.1

# Matrices of fewer rows are decomposed before a thread would have begun.
_PARALLEL_ROWS = 64


class ProductSVD(NamedTuple):
    """Singular value decomposition ``U · diag(S) · Vh`` of a product of thin factors."""

    U: Float[Tensor, "m rho"]
    S: Float[Tensor, " rho"]
    Vh: Float[Tensor, "rho n"]


class ColumnSpace(NamedTuple):
    """Left singular vectors and singular values of a product of thin factors."""

    U: Float[Tensor, "m rho"]
    S: Float[Tensor, " rho"]


@full_precision
def eig(
    matrices: Float[Tensor, "*batch r r"],
) -> tuple[Complex[Tensor, "*batch r"], Complex[Tensor, "*batch r r"]]:
    """Eigenvalues and right eigenvectors of matrices on the CPU, large ones side by side.

    Args:
        matrices: A matrix, or a stack of them.

    Returns:
        The values, in no order, and the vectors, in columns.

    Cost: O(r³) each.
    """
    threads = torch.get_num_threads()
    if threads == 1 or matrices.ndim != 3 or matrices.shape[-1] < _PARALLEL_ROWS:
        values, vectors = torch.linalg.eig(matrices)
        return values, vectors
    # the threads of one such decomposition wait for each other longer than they compute
    found = list(shared_executor("eig", threads, 1).map(torch.linalg.eig, matrices))
    return torch.stack([values for values, _ in found]), torch.stack([V for _, V in found])


@full_precision
def product_svd(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> ProductSVD:
    """Thin SVD of ``B · A`` by QR of both factors and the SVD of their r × r core.

    Args:
        B: Left factor, shape (m, r).
        A: Right factor, shape (r, n).

    Returns:
        All ``min(m, r, n)`` singular triplets, in the basis precision, values descending. Exact to
        rounding; values that are rounding are zero, and not cut off.

    Raises:
        IncompatibleError: If a factor holds NaN or infinity.

    Cost: O((m + n) r² + r³).

    Reference: Golub and Van Loan 2013, "Matrix Computations", §8.6 and §5.2.
    """
    dtype = basis_dtype(B.device)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = core_svd(R_B, R_A)
    return ProductSVD(Q_B @ U, S, Vh @ Q_A.mT)


@full_precision
def column_space(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> ColumnSpace:
    """Orthonormal basis of the column space of ``B · A``, with its singular values.

    The basis depends on the product alone, never on how it is factored: for any invertible G the
    factors ``(B·G, G⁻¹·A)`` give the same subspace.

    Args:
        B: Left factor, shape (m, r).
        A: Right factor, shape (r, n).

    Returns:
        U of shape (m, ρ) with orthonormal columns and S of shape (ρ,), descending, where ρ counts
        the singular values above `RANK_RTOL` times the largest; ρ = 0 for a zero product.

    Raises:
        IncompatibleError: If a factor holds NaN or infinity.

    Cost: O((m + n) r² + r³).

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 4 and 6, on factors.
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
    """Column space by matrix products alone; None where that would cost accuracy.

    With gram = AAᵀ = L·Lᵀ, ΔW·ΔWᵀ = (B·L)(B·L)ᵀ, so the eigenvectors of (B·L)ᵀ(B·L) = V·S²·Vᵀ give
    U = B·L·V·S⁻¹. The span of U is that of B whatever the rounding in L, V and S; what rounding
    does to the orthogonality of U is removed by a Newton-Schulz step, U·(3 - UᵀU)/2.

    Returns:
        The column space, of full rank.
    """
    L, info = torch.linalg.cholesky_ex(gram)
    if int(info) or B.shape[0] < B.shape[1]:
        return None
    gram_B = _column_gram(B)
    if not bool(gram_B.isfinite().all()):
        return None
    values, V = torch.linalg.eigh(L.mT @ gram_B @ L)
    if values.numel() == 0 or not values[0] > 0:
        return None
    # What rounding in the Gram matrices costs: the factors may be large where their product is not.
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
    """Singular value decomposition of the core R_B · R_Aᵀ of a product of factors.

    Args:
        R_B: Triangular factor of B.
        R_A: Triangular factor of Aᵀ.

    Returns:
        The decomposition. Singular values that are rounding, as where terms cancel, are zero: an
        error of eps·‖b_j‖ in column j of B changes the product by eps·Σ_j ‖b_j‖·‖a_j‖.

    Raises:
        IncompatibleError: If the core is not finite.
    """
    core = R_B @ R_A.mT
    if not bool(core.isfinite().all()):
        raise IncompatibleError(
            "the factors hold NaN or infinity, or numbers whose products are too large for float64"
        )
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    terms = (R_B.norm(dim=0) * R_A.norm(dim=0)).sum()
    return ProductSVD(
        U, torch.where(S > _ROUNDINGS_OF_ZERO * torch.finfo(S.dtype).eps * terms, S, 0), Vh
    )


@full_precision
def has_nearly_dependent_rows(A: Float[Tensor, "r n"]) -> bool:
    """Whether rows, brought to one length, have a singular value below about a third."""
    # sums of such rows may cancel most of their terms
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
    """The smallest rank at which what is cut off is no more than the rest of the energy.

    Args:
        S: Singular values, descending.
        energy: Fraction of the squared norm that is kept, in (0, 1].
        norm: The norm, by default that of the singular values.

    Returns:
        The rank; 0 where all singular values are zero.
    """
    squares = S.square()
    total = squares.sum() if norm is None else norm * norm
    # The tail is compared, not the head: 1 - 1e-12 of the energy is lost to rounding in the head.
    tail = squares.flip(0).cumsum(0).flip(0)
    return int((tail > (1 - energy) * total).sum())


def norm(tensor: Tensor) -> float:
    """Euclidean norm of all entries, summed in the basis precision, which no square leaves."""
    return float(torch.linalg.vector_norm(tensor, dtype=basis_dtype(tensor.device)))


@full_precision
def product_norm(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> float:
    """Frobenius norm of ``B · A``, accurate also where the terms of the product cancel.

    Args:
        B: Left factor, shape (m, r).
        A: Right factor, shape (r, n).

    Returns:
        ‖R_B · R_Aᵀ‖_F, with an error of a few float64 roundings of ‖B‖·‖A‖.

    Cost: O((m + n) r²).
    """
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
    """Frobenius inner product ⟨B1·A1, B2·A2⟩ = tr((B1ᵀB2)(A2A1ᵀ)).

    Args:
        B1: Left factor of the first product.
        A1: Right factor of the first product.
        B2: Left factor of the second product.
        A2: Right factor of the second product.

    Returns:
        The inner product, summed in the basis precision.

    Cost: O((m + n) r1 r2).
    """
    dtype = basis_dtype(B1.device)
    left = B1.to(dtype).mT @ B2.to(dtype)
    right = A1.to(dtype) @ A2.to(dtype).mT
    return float((left * right).sum())
