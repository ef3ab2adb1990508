"""The overlap of random subspaces: what chance alone would share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from devec.linalg.random_subspaces import LARGEST_EXACT, largest_cosine_quantile

# Of `chance_level`, and that quantile of Tracy-Widom's law of order 1 (Johnstone 2008, Table 1).
_PROBABILITY = 0.99
_LARGEST_Q = 1024
_TRACY_WIDOM_99 = 2.0234


def random_edge(n: int, p: int, q: int) -> float:
    """Where the largest squared cosine between two random subspaces sits.

    (√(a(1-b)) + √(b(1-a)))² with a = p/n, b = q/n: the upper edge of the spectrum of the product
    of two random projectors, as n grows. Once p + q ≥ n the subspaces must intersect and it is 1.

    Args:
        n: Dimension of the space.
        p: Dimension of the first subspace.
        q: Dimension of the second subspace.

    Returns:
        The edge, in [0, 1].

    Reference: Wachter 1980, "The limiting empirical measure of multiple discriminant ratios".
    """
    if min(p, q) == 0:
        return 0.0
    if p + q >= n:
        return 1.0
    a, b = p / n, q / n
    return (math.sqrt(a * (1 - b)) + math.sqrt(b * (1 - a))) ** 2


@cache
def chance_level(n: int, p: int, q: int) -> float:
    """The squared cosine that two random subspaces exceed in one case of a hundred.

    Exact where one subspace has at most `LARGEST_EXACT` dimensions and the other at most 1024; for
    a line it is the quantile of Beta(q/2, (n-q)/2). Else log(c²/(1-c²)) is μ + σ·TW1 with the
    Tracy-Widom law of order 1, which random subspaces exceed in 0.4 to 1 case of a hundred
    (measured for p from 5 on).

    Args:
        n: Dimension of the space.
        p: Dimension of the first subspace, positive.
        q: Dimension of the second subspace, positive.

    Returns:
        The 99 % quantile; infinity where p + q ≥ n, since there the subspaces intersect whatever
        they are, and no overlap is beyond chance.

    Reference: Chiani 2016, arXiv 1401.3987, for small dimensions; Johnstone 2008, "Multivariate
    analysis and Jacobi ensembles: largest eigenvalue, Tracy-Widom limits and rates of convergence",
    Ann. Statist. 36, Eq. 5 and 6, for others.
    """
    if p + q >= n:
        return math.inf
    p, q = min(p, q), max(p, q)
    if p <= LARGEST_EXACT and q <= _LARGEST_Q:
        return largest_cosine_quantile(n, p, q, _PROBABILITY)
    # Johnstone's (p, m, n) are here p, n - q, q, so m + n - 1 = n - 1.
    size = n - 1
    gamma = 2 * math.asin(math.sqrt((p - 0.5) / size))
    phi = 2 * math.asin(math.sqrt((q - 0.5) / size))
    centre = 2 * math.log(math.tan((phi + gamma) / 2))
    spread = (16 / (size**2 * math.sin(phi + gamma) ** 2 * math.sin(phi) * math.sin(gamma))) ** (
        1 / 3
    )
    return 1 / (1 + math.exp(-(centre + spread * _TRACY_WIDOM_99)))


def pool_level(
    n: int, ranks: Sequence[int], method: str, level: Callable[[int, int, int], float]
) -> float:
    """A level for two subspaces, carried over to the spectrum of a method on k of them.

    `chain`: |λ| ≤ ‖U1ᵀU2‖·‖U2ᵀU3‖···‖UkᵀU1‖, the geometric mean around the cycle to the power k/2.
    `mean` and `principal`: the eigenvalue is at most that of directions at the largest pairwise
    cosine, so the largest pairwise level bounds it. For k = 2 both are the level itself.

    Args:
        n: Dimension of the space.
        ranks: Dimensions ρ_i of the subspaces, two or more.
        method: One of `METHODS`.
        level: `random_edge` or `chance_level`.

    Returns:
        The bound, on the scale of the method's spectrum.
    """
    if method == "chain":
        cycle = zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        return math.prod(math.sqrt(level(n, p, q)) for p, q in cycle)
    return max(level(n, p, q) for i, p in enumerate(ranks) for q in ranks[i + 1 :])
