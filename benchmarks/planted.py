"""Matrices that share planted directions, and the angles between subspaces.

The paper gives the number of shared directions (100) and the range of the noise (σ up to 0.4) and
leaves the rest open. Settled here, and the same in all experiments: a matrix is

    W_i = [S  R_i] · G_i / √r  +  σ · N_i / √n,    i = 1 … k,

with S (n × s) and R_i (n × (r - s)) orthonormal bases of random subspaces, R_i not made orthogonal
to S, and G_i (r × r) and N_i (n × r) standard normal. A column of the signal then has length 1 on
average and a column of the noise has length σ: σ is the ratio of noise to signal. W_i has as many
columns as directions, so noise changes its column space but not its dimension. G_i makes the signal
ill-conditioned, as trained updates are; ``mixed=False`` leaves it out, W_i = [S R_i] + σ·N_i/√n.

Reference: arXiv 2512.22511, appendices 6 and 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.linalg.factors import column_space


@dataclass(frozen=True)
class Setup:
    """How matrices are generated.

    Attributes:
        n: Dimension of the space.
        rank: Directions of each matrix, r.
        shared: Directions that all matrices have, s.
        mixed: Whether random coefficients G_i mix the directions into columns.
    """

    n: int = 1000
    rank: int = 200
    shared: int = 100
    mixed: bool = True


FIGURE_8 = Setup()
# Figure 7 needs dense n × n eigendecompositions, a hundred times: the same shape at a quarter.
FIGURE_7 = Setup(n=250, rank=50, shared=25)


def generator(*seed: int) -> torch.Generator:
    """A random generator of its own for each tuple of small non-negative integers."""
    return torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))


def normal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """Standard normal matrix in float64."""
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def planted(
    setup: Setup, k: int, sigma: float, rng: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Column spaces of k matrices that share directions, and the shared directions.

    Args:
        setup: Dimensions and kind of the matrices.
        k: Number of matrices.
        sigma: Noise level; matrices that differ in nothing else are drawn for equal generators.
        rng: Source of randomness.

    Returns:
        Orthonormal bases of the column spaces of W_1 … W_k, shape (n, r) each, and S, (n, s).
    """
    n, r, s = setup.n, setup.rank, setup.shared
    S = torch.linalg.qr(normal(n, s, rng)).Q
    bases = []
    for _ in range(k):
        W = torch.cat([S, torch.linalg.qr(normal(n, r - s, rng)).Q], dim=1)
        G, N = normal(r, r, rng), normal(n, r, rng)
        if setup.mixed:
            W = W @ G / math.sqrt(r)
        W = W + sigma * N / math.sqrt(n)
        bases.append(column_space(W, torch.eye(r, dtype=W.dtype)).U)
    return bases, S


def principal_angles(Z1: Tensor, Z2: Tensor) -> Tensor:
    """Principal angles between two subspaces, accurate near 0 as well as near π/2.

    The cosine alone cannot tell angles below 1e-8 from 0, so both are used: the cosines are the
    singular values of Z1ᵀZ2, the sines those of Z2 - Z1·Z1ᵀZ2.

    Args:
        Z1: Orthonormal basis, shape (n, p).
        Z2: Orthonormal basis, shape (n, q).

    Returns:
        min(p, q) angles in radians, ascending.

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces".
    """
    if Z1.shape[1] < Z2.shape[1]:
        Z1, Z2 = Z2, Z1
    product = Z1.mT @ Z2
    sines = torch.linalg.svdvals(Z2 - Z1 @ product).flip(0)
    return torch.atan2(sines, torch.linalg.svdvals(product))
