"""The subspace that several column spaces share, by three methods, and what chance would share.

A method takes orthonormal bases ``U_i`` of shape (n, ρ_i) and a threshold τ on the squared cosine
between shared directions, and returns an orthonormal basis of the shared subspace. Since its
columns are orthonormal, ``Z Zᵀ`` is an orthogonal projector.

Bases may be stacks of shape (batch, n, ρ_i), for as many shared subspaces at once. They are asked
for in order, one or two at a time where the method allows it, so that a sequence may compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from devec.errors import IncompatibleError
from devec.linalg.dtypes import to_float64
from devec.linalg.factors import eig
from devec.linalg.precision import full_precision

# Exactly shared directions come out as 1 - O(1e-15) in float64, 1 - O(1e-6) in float32; without
# this allowance τ = 1, the value of the paper's Proposition 3.1, would select nothing.
_SPECTRUM_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}

# Squared cosines below this are those of directions that one subspace has alone.
_SINGLE_SUBSPACE = 1e-9

# A number, or what gives it once the bases, and so their dimensions, are known.
LazyThreshold = float | Callable[[], float]


@runtime_checkable
@runtime_checkable
class OrthonormalBases(Protocol):
    """Orthonormal bases U_i of shape (n, ρ_i), or stacks (batch, n, ρ_i), in a list or computed."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Tensor]:
        """One after the other, as often as asked for."""


@dataclass(frozen=True, eq=False)
class SharedSubspace:
    """What several subspaces of R^n share.

    Attributes:
        basis: Z, orthonormal columns, shape (n, ρ_shared). In a stack as many columns as the
            largest needs; beyond a subspace's own number they are zero.
        spectrum: What the threshold was compared with, descending, on the scale of squared
            cosines: see the method.
        counts: ρ_shared, of each subspace of a stack.
        quantity: What the values of the spectrum are.
        padded: Whether zeros in the spectrum stand for no value, which a stack needs.
    """

    basis: Float[Tensor, "*batch n shared"]
    spectrum: Float[Tensor, "*batch k"]
    counts: Int[Tensor, "*batch"]
    quantity: str = "cos²"
    padded: bool = False

    @property
    def rank(self) -> int:
        """The number of shared directions, of a stack the largest."""
        return self.basis.shape[-1]


@full_precision
def principal_vectors(
    U1: Float[Tensor, "n p"], U2: Float[Tensor, "n q"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Principal vectors of two subspaces and the cosines of the angles between them.

    With U1ᵀU2 = Y·diag(σ)·Xᵀ the vectors are f_i = U1·y_i and g_i = U2·x_i, and f_iᵀg_i = σ_i is
    the cosine of the angle θ_i between them.

    Args:
        U1: Orthonormal basis of the first subspace.
        U2: Orthonormal basis of the second subspace.

    Returns:
        f of shape (n, k), the cosines (descending, in [0, 1]) and g of shape (n, k), k = min(p, q).

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces"; the paper's Theorem 6.1.
    """
    Y, cosines, Xh = torch.linalg.svd(U1.mT @ U2, full_matrices=False)
    return U1 @ Y, cosines.clamp(max=1), U2 @ Xh.mT


@full_precision
def principal(bases: OrthonormalBases, threshold: LazyThreshold) -> SharedSubspace:
    """Shared subspace of two column spaces by principal angles.

    Z holds the principal vectors f_i of the first subspace whose cos² θ_i exceeds the threshold.

    Args:
        bases: Two orthonormal bases, or stacks of them.
        threshold: Smallest squared cosine that counts as shared.

    Returns:
        The shared subspace; its spectrum holds the squared cosines of all principal angles.

    Raises:
        IncompatibleError: If there are not exactly two subspaces.

    Reference: arXiv 2512.22511, Theorem 6.1.
    """
    if len(bases) != 2:
        raise IncompatibleError(
            f"method 'principal' is defined for two subspaces, not {len(bases)}; "
            "use method='mean' or 'chain', or scope='pairwise'"
        )
    first, second = bases
    Y, cosines, _ = torch.linalg.svd(to_float64(first.mT @ second), full_matrices=False)
    squared = cosines.clamp(max=1).square()
    counts = _shared_count(squared, threshold, first.dtype)
    return SharedSubspace(first @ _leading_columns(Y, counts).to(first), squared, counts)


@full_precision
def chain(bases: OrthonormalBases, threshold: LazyThreshold) -> SharedSubspace:
    """Shared subspace from the eigenvectors of the chained projectors P1·P2···Pk.

    The nonzero eigenvalues of the n × n chain are those of the ρ1 × ρ1 matrix
    M = (U1ᵀU2)(U2ᵀU3)···(UkᵀU1), its eigenvectors are U1·y. For k = 2 they are the squared cosines
    and the first principal vectors. For k > 2 M is not symmetric: eigenvalues may be complex (the
    real part is compared with the threshold), shrink as k grows, and depend on the order of the
    bases; eigenvectors are not orthogonal, so an orthonormal basis of their span is taken.

    Args:
        bases: Orthonormal bases U_i, or stacks of them, two or more.
        threshold: Smallest eigenvalue that counts as shared.

    Returns:
        The shared subspace, inside the first column space; its spectrum holds the real parts of
        the eigenvalues.

    Cost: O(n Σ ρ_i ρ_{i+1}), linear in k, with three bases at a time.

    Reference: arXiv 2512.22511, Eq. 8-11.
    """
    if len(bases) == 2:
        return principal(bases, threshold)
    rest = iter(bases)
    first = left = next(rest)
    M = torch.eye(first.shape[-1], dtype=torch.float64)
    for right in rest:
        M = M.to(overlap := to_float64(left.mT @ right)) @ overlap
        left = right
    M = M @ to_float64(left.mT @ first)
    values, vectors = eig(M.cpu())  # which not all devices have
    order = values.real.argsort(descending=True)
    spectrum = values.real.gather(-1, order).clamp(max=1)  # but for rounding
    counts = _shared_count(spectrum, threshold, first.dtype)
    vectors = vectors.gather(-1, order[..., None, :].expand_as(vectors))
    Y = _orthonormal_spans(vectors, counts)
    return SharedSubspace(first @ Y.to(first), spectrum, counts, "eigenvalue")


def _orthonormal_spans(
    vectors: Complex[Tensor, "*batch r k"], counts: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch r shared"]:
    """Real orthonormal bases of the spans of the first so many vectors, in conjugate pairs."""
    size = int(counts.max()) if counts.numel() else 0
    result = vectors.real.new_zeros(*vectors.shape[:-1], size)
    for index in product(*map(range, counts.shape)):
        count, Y = int(counts[index]), vectors[index]
        parts = torch.cat([Y[:, :count].real, Y[:, :count].imag], dim=1)
        result[index][:, :count] = torch.linalg.svd(parts, full_matrices=False).U[:, :count]
    return result


@full_precision
def mean(bases: OrthonormalBases, threshold: LazyThreshold) -> SharedSubspace:
    """Shared subspace from the eigenvectors of the mean projector (P1 + … + Pk)/k.

    Symmetric, independent of the order of the bases, and not shrinking with k. An eigenvalue μ is
    reported as the squared cosine c² at which k directions with pairwise cosine c would have it:
    μ = (1 + (k-1)·c)/k. So one threshold means the same as in `chain`, and for k = 2 the same
    pairs are selected, with their bisectors as the basis.

    Args:
        bases: Orthonormal bases U_i, or stacks of them, two or more.
        threshold: Smallest such squared cosine that counts as shared.

    Returns:
        The shared subspace; its spectrum holds the squared cosines of all eigenvalues above 1/k
        (an eigenvalue of 1/k is a direction that one subspace has alone). In a stack there are
        zeros for the others.

    Cost: O(n (Σ ρ_i)² + (Σ ρ_i)³), with all bases at once.
    """
    k = len(bases)
    stacked = torch.cat(list(bases), dim=-1)
    values, Y = torch.linalg.eigh(to_float64(stacked.mT @ stacked))
    values, Y = values.flip(-1), Y.flip(-1)
    spectrum = ((values - 1) / (k - 1)).clamp(0, 1).square()
    counts = _shared_count(spectrum, threshold, stacked.dtype)
    Y = _leading_columns(Y, counts)
    lengths = values[..., None, : Y.shape[-1]].clamp(min=_SINGLE_SUBSPACE).sqrt()
    Z = stacked @ (Y / lengths).to(stacked)
    spectrum = torch.where(spectrum > _SINGLE_SUBSPACE, spectrum, 0)
    most = int(spectrum.count_nonzero(-1).max()) if spectrum.numel() else 0
    return SharedSubspace(Z, spectrum[..., :most], counts, padded=True)


@full_precision
def deflate(
    U: Float[Tensor, "n rho"],
    others: OrthonormalBases,
    threshold: Callable[[int, int], float],
) -> list[SharedSubspace]:
    """What a target subspace shares with each of the others in turn, taken away after each.

    What is left of the target is U·K, with K an orthonormal basis of the coordinates not yet
    removed. A step finds the principal pairs of U·K and U_j from the SVD of Kᵀ·(UᵀU_j), removes the
    target's member of each pair above the threshold, and goes on with the rest. All of it stays
    inside the target's column space.

    Args:
        U: Orthonormal basis of the target's column space.
        others: Orthonormal bases of the others, in the order in which they are taken.
        threshold: From the dimensions of what is left and of the other, the smallest squared
            cosine that counts as shared.

    Returns:
        A shared subspace for each of the others; together their bases are orthonormal.

    Cost: one product UᵀU_j and O(ρ² ρ_j) for each.

    Reference: arXiv 2512.22511, §4.3.
    """
    K = to_float64(torch.eye(U.shape[1], device=U.device))
    steps = []
    for other in others:
        Y, cosines, _ = torch.linalg.svd(K.mT @ to_float64(U.mT @ other))
        spectrum = cosines.clamp(max=1).square()
        counts = _shared_count(spectrum, threshold(K.shape[1], other.shape[1]), U.dtype)
        shared = int(counts)
        steps.append(SharedSubspace(U @ (K @ Y[:, :shared]).to(U), spectrum, counts))
        K = K @ Y[:, shared:]
    return steps


@full_precision
def shared_by_all(
    found: SharedSubspace, bases: OrthonormalBases, level: Callable[[int, int], float]
) -> SharedSubspace:
    """The directions of a shared subspace that every one of the subspaces holds beyond chance.

    A spectrum measures a direction in all subspaces together. For three or more, a low threshold
    can be exceeded by a direction that some of them share and another does not have at all.

    Args:
        found: The shared subspace of a method, or a stack of them.
        bases: Orthonormal bases U_i of the subspaces, gone through three times.
        level: From n and the dimension of a subspace to the squared cosine ‖U_iᵀz‖² that a random
            direction z rarely exceeds.

    Returns:
        The subspace of the columns z of Z, rotated to the eigenvectors of Σ ZᵀU_iU_iᵀZ, that every
        U_i holds beyond the level. What U_i holds is measured on Σ_{j≠i} U_jU_jᵀz, the direction
        that the others agree on: z itself leans towards each U_i by having been chosen.
    """
    Z = found.basis
    overlaps = [U.mT @ Z for U in bases]
    _, V = torch.linalg.eigh(sum(to_float64(overlap.mT @ overlap) for overlap in overlaps))
    V = V.flip(-1).to(Z)
    total = sum(U @ (overlap @ V) for U, overlap in zip(bases, overlaps, strict=True))
    held = torch.ones(*Z.shape[:-2], Z.shape[-1], dtype=torch.bool, device=Z.device)
    for U, overlap in zip(bases, overlaps, strict=True):
        agreed = total - U @ (overlap @ V)
        lengths = agreed.square().sum(-2)
        held &= (U.mT @ agreed).square().sum(-2) > level(*U.shape[-2:]) * lengths
    order = held.byte().argsort(dim=-1, descending=True, stable=True)
    rotated = (Z @ V).gather(-1, order[..., None, :].expand_as(Z))
    counts = held.sum(-1)
    return replace(found, basis=_leading_columns(rotated, counts), counts=counts)


def _shared_count(
    spectrum: Float[Tensor, "*batch k"], threshold: LazyThreshold, dtype: torch.dtype
) -> Int[Tensor, "*batch"]:
    """How many values of a descending spectrum exceed the threshold, but for rounding of bases."""
    level = threshold() if callable(threshold) else threshold
    return (spectrum >= level * (1 - _SPECTRUM_ROUNDING[dtype])).sum(-1)


def _leading_columns(
    Y: Float[Tensor, "*batch r k"], counts: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch r shared"]:
    """The first so many columns of every matrix, with zeros up to the largest number of them."""
    size = int(counts.max()) if counts.numel() else 0
    wanted = torch.arange(size, device=Y.device) < counts[..., None]
    return Y[..., :size] * wanted[..., None, :]


METHODS: dict[str, Callable[[OrthonormalBases, LazyThreshold], SharedSubspace]] = {
    "chain": chain,
    "mean": mean,
    "principal": principal,
}
