"""Exact law of the largest squared cosine between two random subspaces of low dimension.

For p ≤ q the squared cosines are the roots of a multivariate beta matrix. Their joint density is
Π x_i^(α-1)·(1-x_i)^(β-1)·Π|x_i - x_j| with α = (q-p+1)/2 and β = (n-q-p+1)/2, and the probability
that all of them are below x is a ratio of Pfaffians. For p = 1 the law is Beta(q/2, (n-q)/2).
"""

from __future__ import annotations

import math

import torch

# Monomials are nearly linearly dependent in high dimension. Up to this p the error of the
# distribution function is at most 2e-6 in float64, for q up to 1024 and n up to 16384.
LARGEST_EXACT = 4

_ROUNDOFF = 1e-15
_TINY = 1e-300
_MOST_TERMS = 10_000
_BISECTIONS = 60


def largest_cosine_quantile(n: int, p: int, q: int, probability: float) -> float:
    """Quantile of the largest squared cosine, for 1 ≤ p ≤ `LARGEST_EXACT`, p ≤ q and p + q < n."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if largest_cosine_cdf(n, p, q, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def largest_cosine_cdf(n: int, p: int, q: int, x: float) -> float:
    """Probability that the largest squared cosine is at most x, in [0, 1]; dimensions as above."""
    # Chiani 2016, arXiv 1401.3987, "Distribution of the largest root of a matrix for Roy's test in
    # multivariate analysis of variance", Theorem 1 and Algorithm 1.
    a = [(q - p + 1) / 2 + i for i in range(p)]
    b = (n - q - p + 1) / 2
    return math.sqrt(max(0.0, _squared_pfaffian(a, b, x)) / _squared_pfaffian(a, b, 1.0))


def _squared_pfaffian(a: list[float], b: float, x: float) -> float:
    """The determinant of P(X_j < X_i < x) - P(X_i < X_j < x) for X_i ~ Beta(a_i, b)."""
    # for an odd number of variables the matrix is bordered by P(X_i < x)
    p = len(a)
    below = [beta_cdf(x, ai, b) for ai in a]
    scales = [_log_beta(ai, b) for ai in a]
    D = torch.zeros(p + p % 2, p + p % 2, dtype=torch.float64)
    for j in range(p):
        # integration by parts, from i to i + 1, starting from two variables with the same law
        ordered = below[j] ** 2 / 2
        for i in range(j, p - 1):
            total = a[i] + a[j]
            step = math.exp(_log_beta(total, 2 * b) - scales[i] - scales[j]) / a[i]
            ordered -= step * beta_cdf(x, total, 2 * b)
            D[i + 1, j] = 2 * ordered - below[i + 1] * below[j]
    if p % 2:
        D[p, :p] = torch.tensor(below, dtype=torch.float64)
    return float(torch.linalg.det(D - D.mT))


def _log_beta(a: float, b: float) -> float:
    """The logarithm of the beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Distribution function of Beta(a, b) for positive a and b, with an error of about 1e-11."""
    # the continued fraction DLMF 8.17.22, evaluated by Lentz's method
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction of the complement converges faster
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)) / a
    value, C, D = 1.0, 1.0, 0.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        D = 1 / ((1 + d * D) or _TINY)
        C = (1 + d / C) or _TINY
        value *= C * D
        if abs(C * D - 1) < _ROUNDOFF:
            break
    return front / value
