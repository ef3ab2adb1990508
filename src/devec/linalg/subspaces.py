"""Subspaces that several column spaces share: the methods chain, mean and principal, and deflation.

A method takes orthonormal bases ``U_i`` of shape (n, ρ_i) and a threshold τ on squared cosines. It
returns an orthonormal basis Z of the shared subspace, so ``Z·Zᵀ`` is an orthogonal projector.

The bases may be stacks of shape (batch, n, ρ_i), with one shared subspace for each entry. Methods
iterate over the bases in order and keep as few as they can, so a sequence may compute them lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from devec.errors import IncompatibleError
from devec.linalg.chance import PairValue, cycle_bound, largest_pair_bound
from devec.linalg.dtypes import to_float64
from devec.linalg.factors import eig
from devec.linalg.precision import full_precision

# Exactly shared directions come out as 1 - O(1e-15) in float64, 1 - O(1e-6) in float32; without
# this allowance τ = 1, the value of the paper's Proposition 3.1, would select nothing.
_SPECTRUM_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}

# Squared cosines below this belong to directions that lie in a single subspace.
_SINGLE_SUBSPACE = 1e-9

# A threshold, or a function that computes it once the dimensions of the bases are known.
LazyThreshold = float | Callable[[], float]


@runtime_checkable
class OrthonormalBases(Protocol):
    """Bases U_i of shape (n, ρ_i) or (batch, n, ρ_i): a list, or a sequence that computes them."""

    def __len__(self) -> int:
        """The number of bases."""

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the bases; may be called repeatedly."""


@dataclass(frozen=True, eq=False)
class SharedSubspace:
    """The subspace of R^n that several subspaces share, or a stack of such subspaces.

    Attributes:
        basis: Z with orthonormal columns, shape (n, ρ_shared). A stack has as many columns as its
            largest subspace; the columns beyond a subspace's own dimension are zero.
        spectrum: The values compared with the threshold, descending, on the scale of squared
            cosines; each method defines them.
        counts: ρ_shared of each subspace.
        quantity: What the values of the spectrum are.
        padded: Whether zeros at the end of the spectrum stand for missing values of a stack.
    """

    basis: Float[Tensor, "*batch n shared"]
    spectrum: Float[Tensor, "*batch k"]
    counts: Int[Tensor, "*batch"]
    quantity: str = "cos²"
    padded: bool = False

    @property
    def rank(self) -> int:
        """The number of shared directions; the largest number in a stack."""
        return self.basis.shape[-1]


@full_precision
def principal_vectors(
    U1: Float[Tensor, "n p"], U2: Float[Tensor, "n q"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Principal vectors of two subspaces and the cosines of the angles between them.

    With the SVD U1ᵀU2 = Y·diag(σ)·Xᵀ, the principal vectors are f_i = U1·y_i and g_i = U2·x_i, and
    f_iᵀg_i = σ_i is the cosine of the principal angle θ_i.

    Args:
        U1: Orthonormal basis of the first subspace, shape (n, p), float32 or float64.
        U2: Orthonormal basis of the second subspace, shape (n, q), of the same dtype.

    Returns:
        The vectors f of shape (n, k), the cosines of shape (k,), descending and in [0, 1], and the
        vectors g of shape (n, k), with k = min(p, q). Exact to rounding.

    Cost: O(n·p·q + p·q·k).

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces"; arXiv 2512.22511, Theorem 6.1.

    Example:
        >>> import torch
        >>> from devec.linalg.subspaces import principal_vectors
        >>> E = torch.eye(4, dtype=torch.float64)
        >>> f, cosines, g = principal_vectors(E[:, :2], E[:, 1:3])
        >>> cosines.round(decimals=6).tolist()
        [1.0, 0.0]
    """
    Y, cosines, Xh = torch.linalg.svd(U1.mT @ U2, full_matrices=False)
    return U1 @ Y, cosines.clamp(max=1), U2 @ Xh.mT


@full_precision
def principal(bases: OrthonormalBases, threshold: LazyThreshold) -> SharedSubspace:
    """Subspace that two column spaces share, by principal angles.

    Z holds the principal vectors f_i of the first subspace with cos² θ_i ≥ τ.

    Args:
        bases: Two orthonormal bases of shapes (n, ρ_1) and (n, ρ_2), or two stacks of them, float32
            or float64.
        threshold: τ, the smallest squared cosine that counts as shared, in [0, 1].

    Returns:
        The shared subspace, inside the first column space; exact to rounding. Its spectrum holds
        the squared cosines of all principal angles.

    Raises:
        IncompatibleError: If there are not exactly two subspaces.

    Cost: O(n·ρ_1·ρ_2).

    Reference: arXiv 2512.22511, Theorem 6.1.

    Example:
        >>> import torch
        >>> from devec.linalg.subspaces import principal
        >>> E = torch.eye(4, dtype=torch.float64)
        >>> shared = principal([E[:, :2], E[:, 1:3]], threshold=0.85)
        >>> shared.rank, shared.basis.abs().squeeze().tolist()
        (1, [0.0, 1.0, 0.0, 0.0])
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

    The nonzero eigenvalues of the n × n product are those of the ρ_1 × ρ_1 matrix
    M = (U1ᵀU2)(U2ᵀU3)···(UkᵀU1), and its eigenvectors are U1·y. For k = 2 they are the squared
    cosines and the principal vectors of the first subspace. For k > 2 M is not symmetric. Its
    eigenvalues may be complex (the real part is compared with the threshold), shrink as k grows,
    and depend on the order of the bases. Its eigenvectors are not orthogonal, so Z is an
    orthonormal basis of their span.

    Args:
        bases: Two or more orthonormal bases U_i of shape (n, ρ_i), or stacks of them, float32 or
            float64.
        threshold: τ, the smallest eigenvalue that counts as shared, in [0, 1].

    Returns:
        The shared subspace, inside the first column space; exact to rounding. Its spectrum holds
        the real parts of the eigenvalues.

    Cost: O(n Σ ρ_i·ρ_{i+1} + ρ_1³), linear in k, with three bases in memory.

    Reference: arXiv 2512.22511, Eq. 8-11.

    Example:
        >>> import torch
        >>> from devec.linalg.subspaces import chain
        >>> E = torch.eye(5, dtype=torch.float64)
        >>> chain([E[:, :3], E[:, 1:4], E[:, 1:3]], threshold=0.85).rank
        2
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
    values, vectors = eig(M.cpu())  # not every device has this decomposition
    order = values.real.argsort(descending=True)
    spectrum = values.real.gather(-1, order).clamp(max=1)  # rounding can exceed 1
    counts = _shared_count(spectrum, threshold, first.dtype)
    vectors = vectors.gather(-1, order[..., None, :].expand_as(vectors))
    Y = _orthonormal_spans(vectors, counts)
    return SharedSubspace(first @ Y.to(first), spectrum, counts, "eigenvalue")


def _orthonormal_spans(
    vectors: Complex[Tensor, "*batch r k"], counts: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch r shared"]:
    """Real orthonormal bases of the spans of leading eigenvectors, in conjugate pairs."""
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

    The mean projector is symmetric, does not depend on the order of the bases, and its eigenvalues
    do not shrink with k. k directions with pairwise cosine c give it the eigenvalue
    μ = (1 + (k-1)·c)/k, so each μ is reported as the squared cosine c². The threshold thus has the
    same meaning as in `chain`; for k = 2 both select the same principal pairs, of which `mean`
    takes the bisectors.

    Args:
        bases: Two or more orthonormal bases U_i of shape (n, ρ_i), or stacks of them, float32 or
            float64.
        threshold: τ, the smallest squared cosine c² that counts as shared, in [0, 1].

    Returns:
        The shared subspace; exact to rounding. Its spectrum holds c² of all eigenvalues above 1/k,
        the eigenvalue of a direction in a single subspace. A stack has zeros for the others.

    Cost: O(n (Σ ρ_i)² + (Σ ρ_i)³), with all bases in memory.

    Example:
        >>> import torch
        >>> from devec.linalg.subspaces import mean
        >>> E = torch.eye(5, dtype=torch.float64)
        >>> shared = mean([E[:, :3], E[:, 1:4], E[:, 1:3]], threshold=0.85)
        >>> shared.rank, shared.spectrum.round(decimals=6).tolist()
        (2, [1.0, 1.0])
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
    """Subspaces that a target shares with other subspaces, each removed before the next step.

    The remainder of the target is U·K, where K is an orthonormal basis of the coordinates not yet
    removed. Step j finds the principal pairs of U·K and U_j from the SVD of Kᵀ·(UᵀU_j) and removes
    from the remainder the target's vector of each pair with a squared cosine of at least τ. The
    remainder never leaves the target's column space.

    Args:
        U: Orthonormal basis of the target's column space, shape (n, ρ), float32 or float64.
        others: Orthonormal bases U_j of shape (n, ρ_j), in the order of the steps.
        threshold: From the dimensions of the remainder and of U_j to τ, in [0, 1].

    Returns:
        One shared subspace for each of the others; exact to rounding. All their bases together are
        orthonormal.

    Cost: O(n·ρ·ρ_j + ρ²·ρ_j) for each.

    Reference: arXiv 2512.22511, §4.3.

    Example:
        >>> import torch
        >>> from devec.linalg.subspaces import deflate
        >>> E = torch.eye(5, dtype=torch.float64)
        >>> steps = deflate(E[:, :3], [E[:, 1:4], E[:, :2]], lambda p, q: 0.85)
        >>> [step.rank for step in steps]  # e2 and e3, then e1
        [2, 1]
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
    candidate: SharedSubspace, bases: OrthonormalBases, chance: Callable[[int, int], float]
) -> SharedSubspace:
    """The directions of a shared subspace that every subspace contains beyond chance."""
    # A spectrum measures a direction in all subspaces together: with three or more, a direction
    # that only some of them share can exceed a low threshold. The columns z of the rotated Z stay
    # if ‖U_iᵀd‖²/‖d‖² exceeds chance(n, ρ_i) for every i, with d = Σ_{j≠i} U_jU_jᵀz, the direction
    # on which the other subspaces agree: z itself is biased towards each U_i, for it was selected.
    Z = candidate.basis
    overlaps = [U.mT @ Z for U in bases]
    # rotated to the eigenvectors of Σ ZᵀU_iU_iᵀZ
    _, V = torch.linalg.eigh(sum(to_float64(overlap.mT @ overlap) for overlap in overlaps))
    V = V.flip(-1).to(Z)
    total = sum(U @ (overlap @ V) for U, overlap in zip(bases, overlaps, strict=True))
    kept = torch.ones(*Z.shape[:-2], Z.shape[-1], dtype=torch.bool, device=Z.device)
    for U, overlap in zip(bases, overlaps, strict=True):
        agreed = total - U @ (overlap @ V)
        lengths = agreed.square().sum(-2)
        kept &= (U.mT @ agreed).square().sum(-2) > chance(*U.shape[-2:]) * lengths
    order = kept.byte().argsort(dim=-1, descending=True, stable=True)
    rotated = (Z @ V).gather(-1, order[..., None, :].expand_as(Z))
    counts = kept.sum(-1)
    return replace(candidate, basis=_leading_columns(rotated, counts), counts=counts)


def _shared_count(
    spectrum: Float[Tensor, "*batch k"], threshold: LazyThreshold, dtype: torch.dtype
) -> Int[Tensor, "*batch"]:
    """The number of values of a descending spectrum that reach the threshold, up to rounding."""
    value = threshold() if callable(threshold) else threshold
    return (spectrum >= value * (1 - _SPECTRUM_ROUNDING[dtype])).sum(-1)


def _leading_columns(
    Y: Float[Tensor, "*batch r k"], counts: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch r shared"]:
    """The leading columns of every matrix, padded with zeros to the largest count."""
    size = int(counts.max()) if counts.numel() else 0
    selected = torch.arange(size, device=Y.device) < counts[..., None]
    return Y[..., :size] * selected[..., None, :]


@dataclass(frozen=True)
class Method:
    """A way to find the subspace that several subspaces share.

    Attributes:
        name: What users call it.
        find: The function from orthonormal bases and a threshold to the shared subspace.
        bound: From the dimensions n and ρ_i, and a bound for two subspaces, a bound of the spectrum
            of the method for all of them.
        most: Largest number of subspaces that it compares; None for any number.
    """

    name: str
    find: Callable[[OrthonormalBases, LazyThreshold], SharedSubspace]
    bound: Callable[[int, Sequence[int], PairValue], float]
    most: int | None = None

    def __call__(self, bases: OrthonormalBases, threshold: LazyThreshold) -> SharedSubspace:
        """The shared subspace."""
        return self.find(bases, threshold)


METHODS = {
    method.name: method
    for method in (
        Method("chain", chain, cycle_bound),
        Method("mean", mean, largest_pair_bound),
        Method("principal", principal, largest_pair_bound, most=2),
    )
}
