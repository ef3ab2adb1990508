"""Overlap of random subspaces: the random edge, and the chance level for a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from devec.linalg.random_subspaces import LARGEST_EXACT, largest_cosine_quantile

# The chance level is this quantile; below it for the Tracy-Widom law of order 1 (Johnstone 2008,
# Table 1).
_PROBABILITY = 0.99
_TRACY_WIDOM_99 = 2.0234
_LARGEST_Q = 1024  # up to which the exact law has been checked


def random_edge(n: int, p: int, q: int) -> float:
    """Asymptotic upper edge of the squared cosines between two random subspaces.

    (√(a(1-b)) + √(b(1-a)))² with a = p/n and b = q/n: the limit of the largest squared cosine as n
    grows. For p + q = n this is 1. For p + q > n any two subspaces intersect, and the edge is 1.

    Args:
        n: Dimension of the space, positive.
        p: Dimension of the first subspace, from 0 to n.
        q: Dimension of the second subspace, from 0 to n.

    Returns:
        The edge, in [0, 1]; exact in the limit, so the largest squared cosine of finite subspaces
        scatters around it. 0 if p or q is 0.

    Cost: O(1).

    Reference: Wachter 1980, "The limiting empirical measure of multiple discriminant ratios".

    Example:
        >>> from devec.linalg.chance import random_edge
        >>> round(random_edge(1000, 16, 16), 4)
        0.063
        >>> random_edge(100, 60, 60)
        1.0
    """
    if min(p, q) == 0:
        return 0.0
    if p + q >= n:
        return 1.0
    a, b = p / n, q / n
    return (math.sqrt(a * (1 - b)) + math.sqrt(b * (1 - a))) ** 2


@cache
def chance_level(n: int, p: int, q: int) -> float:
    """99th percentile of the largest squared cosine between two random subspaces.

    Exact law for small dimensions; for a line (p = 1) it is that of Beta(q/2, (n-q)/2). Otherwise
    log(c²/(1-c²)) = μ + σ·TW1 with the Tracy-Widom law of order 1.

    Args:
        n: Dimension of the space, positive.
        p: Dimension of the first subspace, positive.
        q: Dimension of the second subspace, positive.

    Returns:
        The percentile, in (0, 1). Exact to 2e-6 in probability if one dimension is at most
        `LARGEST_EXACT`, the other at most 1024 and n at most 16384. Otherwise approximate: 0.4 % to
        1 % of random subspaces exceed it (measured for p from 5 on). Infinity if p + q ≥ n: for
        p + q > n any two subspaces intersect, so no overlap is beyond chance, and for p + q = n the
        asymptotic edge is 1 and no level is set.

    Cost: below 0.1 s for the exact law, O(1) otherwise; results are cached.

    Reference: Chiani 2016, arXiv 1401.3987; Johnstone 2008, "Multivariate analysis and Jacobi
    ensembles: largest eigenvalue, Tracy-Widom limits and rates of convergence", Ann. Statist. 36,
    Eq. 5 and 6.

    Example:
        >>> from devec.linalg.chance import chance_level, random_edge
        >>> random_edge(1000, 16, 16) < chance_level(1000, 16, 16) < 0.1
        True
        >>> chance_level(100, 60, 60)
        inf
    """
    if p + q >= n:
        return math.inf
    p, q = min(p, q), max(p, q)
    if p <= LARGEST_EXACT and q <= _LARGEST_Q:
        return largest_cosine_quantile(n, p, q, _PROBABILITY)
    # Johnstone's (p, m, n) are (p, n - q, q) here, so his m + n - 1 is n - 1.
    size = n - 1
    gamma = 2 * math.asin(math.sqrt((p - 0.5) / size))
    phi = 2 * math.asin(math.sqrt((q - 0.5) / size))
    centre = 2 * math.log(math.tan((phi + gamma) / 2))
    spread = (16 / (size**2 * math.sin(phi + gamma) ** 2 * math.sin(phi) * math.sin(gamma))) ** (
        1 / 3
    )
    return 1 / (1 + math.exp(-(centre + spread * _TRACY_WIDOM_99)))


# Dimensions n, p, q → a value for two subspaces of these dimensions: `random_edge`, `chance_level`.
PairValue = Callable[[int, int, int], float]


def cycle_bound(n: int, ranks: Sequence[int], of_pair: PairValue) -> float:
    """Bound of an eigenvalue of chained projectors, from a bound for two subspaces.

    |λ| ≤ ‖U1ᵀU2‖·‖U2ᵀU3‖···‖UkᵀU1‖: the product of √of_pair over neighbours in the cycle.

    Args:
        n: Dimension of the space.
        ranks: Dimensions ρ_i of the subspaces, two or more.
        of_pair: Bound of the squared cosine between two subspaces.

    Returns:
        The bound of λ, as exact as `of_pair`; for k = 2 that of the pair.

    Cost: O(k) calls of `of_pair`.

    Example:
        >>> from devec.linalg.chance import cycle_bound, random_edge
        >>> round(cycle_bound(1000, [16, 16, 16], random_edge), 4)
        0.0158
    """
    cycle = zip(ranks, [*ranks[1:], ranks[0]], strict=True)
    return math.prod(math.sqrt(of_pair(n, p, q)) for p, q in cycle)


def largest_pair_bound(n: int, ranks: Sequence[int], of_pair: PairValue) -> float:
    """Bound of the squared cosine that `mean` and `principal` report, from one for two subspaces.

    An eigenvalue of the mean projector is at most that of k directions at the largest pairwise
    cosine, so the largest pairwise bound holds for all of them.

    Args:
        n: Dimension of the space.
        ranks: Dimensions ρ_i of the subspaces, two or more.
        of_pair: Bound of the squared cosine between two subspaces.

    Returns:
        The bound, as exact as `of_pair`; for k = 2 that of the pair.

    Cost: O(k²) calls of `of_pair`.

    Example:
        >>> from devec.linalg.chance import largest_pair_bound, random_edge
        >>> largest_pair_bound(1000, [16, 16], random_edge) == random_edge(1000, 16, 16)
        True
    """
    return max(of_pair(n, p, q) for i, p in enumerate(ranks) for q in ranks[i + 1 :])
