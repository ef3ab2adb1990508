"""Shared subspaces of dense matrices, and how far rounding may move them.

Nothing here is shared with devec. How much an invariant subspace moves with rounding depends on the
gap in the spectrum and, for a chain of three or more, on how far its matrix is from normal. So the
same is computed once more from bases that are off by the rounding of the working precision, and
what that changes, several times over, is the tolerance.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch

from support.pools.random_pools import RANK_RTOL

# Orthonormal bases of the working precision, and products with them (README: 1e-5 of dense truth).
BASES = {torch.float32: 2e-6, torch.float64: 1e-11}
DENSE = {torch.float32: 1e-5, torch.float64: 1e-10}
SAFETY = 10
TRIALS = 2
CLEAR = 1e-3  # thresholds keep this distance from eigenvalues
EXACT = 1e-10  # eigenvalues so near to one are those of directions that are shared exactly


@dataclass(frozen=True, eq=False)
class Space:
    """A column space.

    Attributes:
        U: Orthonormal basis.
        off: How far from it a basis may be that is computed in the working precision.
        certain: Whether its dimension is beyond doubt: no singular value is near the tolerance.
    """

    U: np.ndarray
    off: float
    certain: bool

    @property
    def rank(self):
        return self.U.shape[1]


def space(change, dtype):
    """The column space of a change, and its accuracy where the pool works in a precision."""
    U, S, _ = np.linalg.svd(change.low, full_matrices=False)
    rtol = RANK_RTOL[change.dtype]
    if not len(S) or S[0] == 0:
        return Space(U[:, :0], 0.0, certain=True)
    # Products are formed in float64 from factors that are exact, so that what is duplicated stays
    # so. But a DoRA's B is multiplied by a D that is known to the working precision.
    level, weakest = 1e-15 * change.lengths, S[S > rtol * S[0]][-1]
    noise = 3e-7 * change.lengths if change.gained and change.dtype == torch.float32 else level
    near = (S > 0.05 * rtol * S[0]) & (S < 20 * rtol * S[0])
    certain = not near.any() and level < 0.05 * rtol * S[0] and noise < 0.05 * weakest
    rank = int((S > rtol * S[0]).sum())
    return Space(U[:, :rank], BASES[dtype] + noise / weakest, bool(certain))


def moved(one, rng):
    """The basis of a space, off by as much as rounding may make it."""
    G = rng.standard_normal(one.U.shape)
    G *= one.off / (np.sqrt(one.U.shape[0]) + np.sqrt(max(1, one.rank)))
    return np.linalg.qr(one.U + G)[0]


def projector(U):
    """U·Uᵀ."""
    return U @ U.T


class Chain:
    """Eigenvectors of P1·P2···Pk; for two, of P1·P2·P1, whose nonzero eigenvalues are the same."""

    def __init__(self, bases):
        projectors = [projector(U) for U in bases]
        first = projectors[0]
        self.product = np.linalg.multi_dot([*projectors, first])
        self.symmetric = len(bases) == 2
        self.size = min(U.shape[1] for U in bases) if self.symmetric else bases[0].shape[1]
        if self.symmetric:
            values, self.vectors = np.linalg.eigh((self.product + self.product.T) / 2)
        else:
            values = np.linalg.eigvals(self.product).real
        self.values = np.sort(values)[::-1]

    def basis(self, count):
        """Orthonormal basis of the invariant subspace of the largest eigenvalues."""
        if self.symmetric:
            return self.vectors[:, ::-1][:, :count]
        if not count:
            return np.zeros((len(self.product), 0))
        below = self.values[count] if count < len(self.values) else -np.inf
        level = (self.values[count - 1] + below) / 2
        # of the ordered Schur form, which needs no eigenvectors: they may be nearly dependent
        _, Q, found = scipy.linalg.schur(
            self.product, output="complex", sort=lambda value: value.real > level
        )
        assert found == count
        both = np.concatenate([Q[:, :count].real, Q[:, :count].imag], axis=1)
        return np.linalg.svd(both, full_matrices=False)[0][:, :count]


class Mean:
    """Eigenvectors of (P1 + … + Pk)/k, eigenvalues on the scale of squared cosines."""

    def __init__(self, bases):
        k = len(bases)
        values, vectors = np.linalg.eigh(sum(projector(U) for U in bases))
        self.vectors = vectors[:, ::-1]
        self.values = np.clip((values[::-1] - 1) / (k - 1), 0, 1) ** 2
        self.size = len(values)

    def basis(self, count):
        return self.vectors[:, :count]


METHODS = {"chain": Chain, "mean": Mean, "principal": Chain}


class Shared:
    """What spaces share by a method, and how far rounding may move it."""

    def __init__(self, spaces, method):
        self.spaces, self.method = spaces, method
        self.empty = any(s.rank == 0 for s in spaces)
        make = METHODS[method]
        self.n = len(spaces[0].U)
        if self.empty:
            return
        self.found = make([s.U for s in spaces])
        rng = np.random.default_rng(0)
        self.trials = [make([moved(s, rng) for s in spaces]) for _ in range(TRIALS)]

    @cached_property
    def values(self):
        """The spectrum, descending, zeros behind it for directions that are in one space alone."""
        return np.zeros(0) if self.empty else self.found.values

    @cached_property
    def values_off(self):
        """How far rounding may move a value of the spectrum."""
        if self.empty:
            return 0.0
        most = max(s.off for s in self.spaces)
        changes = [np.abs(t.values - self.values).max() for t in self.trials]
        return SAFETY * max(most, *changes)

    @property
    def certain(self):
        """Whether the spectrum is known well enough to be cut."""
        return all(s.certain for s in self.spaces) and self.values_off < CLEAR / 2

    def clear_of(self, threshold):
        """Whether no value is so near a threshold that rounding could decide."""
        if threshold < 1:
            return not (np.abs(self.values - threshold) < CLEAR).any()
        return not ((self.values > 1 - CLEAR) & (self.values < 1 - EXACT)).any()

    def count(self, threshold):
        """How many values exceed a threshold that is clear of them."""
        return int((self.values > (threshold if threshold < 1 else 1 - CLEAR)).sum())

    def basis(self, count):
        """Z, and how far rounding may move its projector."""
        if not count:
            return np.zeros((self.n, 0)), 0.0
        Z = self.found.basis(count)
        P = projector(Z)
        changes = [np.linalg.norm(projector(t.basis(count)) - P, 2) for t in self.trials]
        return Z, SAFETY * max(max(s.off for s in self.spaces), *changes)


def deflated(spaces, threshold):
    """Iterative scope: what the first space shares with each of the others, taken away in turn.

    Returns:
        For each of the others: the rank left before, the squared cosines, Z and how far off it may
        be; None if a value is so near the threshold that rounding could decide.
    """
    target, *others = spaces
    U, steps, off = target.U, [], target.off
    for other in others:
        V = other.U
        Y, cosines, _ = np.linalg.svd(U.T @ V, full_matrices=True)
        squared = np.clip(cosines, 0, 1) ** 2
        cut = threshold if threshold < 1 else 1 - CLEAR
        near = np.abs(squared - threshold) < CLEAR
        if threshold == 1:
            near = (squared > 1 - CLEAR) & (squared < 1 - EXACT)
        if near.any() or SAFETY * (off + other.off) > CLEAR / 2:
            return None
        count = int((squared > cut).sum())
        # singular subspaces move by rounding over the gap between the cosines (Wedin)
        inside = cosines[count - 1] if count else 1.0
        outside = cosines[count] if count < len(cosines) else 0.0
        gap = inside - (outside if U.shape[1] > count else 0.0)
        off = off + SAFETY * (off + other.off) / max(gap, 1e-9) if count else off
        steps.append((U.shape[1], squared, U @ Y[:, :count], off))
        U = U @ Y[:, count:]
    return steps
