"""The exact law of overlap by chance, beside SciPy's and beside random subspaces."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from devec.linalg.chance import chance_level
from devec.linalg.random_subspaces import (
    LARGEST_EXACT,
    beta_cdf,
    largest_cosine_cdf,
    largest_cosine_quantile,
)
from support.folding import folded

RUNS = 40_000


def largest_cosines(n, p, q, runs=RUNS):
    """The largest squared cosine between a fixed subspace and random ones.

    The squared cosines are the roots of (A + B)⁻¹·A with A and B of Wishart's law with q and n - q
    degrees of freedom, here by their Bartlett factors.
    """
    p, q = min(p, q), max(p, q)
    rng = np.random.default_rng([n, p, q])

    def factor(freedom):
        L = np.tril(rng.standard_normal((runs, p, p)), -1)
        for i in range(p):
            L[:, i, i] = np.sqrt(rng.chisquare(freedom - i, runs))
        return torch.from_numpy(L)

    A, B = factor(q), factor(n - q)
    whole = torch.linalg.cholesky(A @ A.mT + B @ B.mT)
    cosines = torch.linalg.solve_triangular(whole, A, upper=False)
    return (torch.linalg.matrix_norm(cosines, 2) ** 2).numpy()


def test_the_simulation_is_of_subspaces():
    """The Wishart factors give the law of cosines between bases from a QR."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.standard_normal((RUNS, 20, 3)))[0]
    direct = np.linalg.norm(bases[:, :5].transpose(0, 2, 1), 2, axis=(1, 2)) ** 2
    assert scipy.stats.ks_2samp(direct, largest_cosines(20, 3, 5)).pvalue > 1e-4


@pytest.mark.parametrize("b", [0.5, 2, 31.5, 2000, 8000])
@folded("a", [0.5, 1, 3.5, 40, 800])
def test_the_beta_law_is_scipys(a, b):
    for x in (0.0, 1e-6, 1e-3, 0.02, a / (a + b), 0.5, 0.97, 1.0):
        assert beta_cdf(x, a, b) == pytest.approx(scipy.special.betainc(a, b, x), abs=1e-10)


@pytest.mark.parametrize("n", [3, 8, 64, 320, 1024, 11008])
@folded("q", [1, 2, 16, 300])
def test_the_level_of_a_line_is_the_quantile_of_a_beta_law(n, q):
    if q + 1 < n:
        want = scipy.stats.beta(q / 2, (n - q) / 2).ppf(0.99)
        assert chance_level(n, 1, q) == pytest.approx(want, rel=1e-9)
        assert chance_level(n, q, 1) == chance_level(n, 1, q)


RANKS = [(1, 1), (1, 2), (1, 7), (2, 2), (2, 3), (2, 16), (3, 3), (3, 8), (4, 4), (4, 16), (4, 60)]


@pytest.mark.parametrize("n", [10, 64, 320])
@folded("ranks", RANKS)
def test_small_ranks_exceed_the_level_in_one_case_of_a_hundred(n, ranks):
    if sum(ranks) >= n:
        assert chance_level(n, *ranks) == math.inf
        return
    share = (largest_cosines(n, *ranks) > chance_level(n, *ranks)).mean()
    deviation = math.sqrt(0.01 * 0.99 / RUNS)  # of a binomial law
    assert share == pytest.approx(0.01, abs=4 * deviation)


@pytest.mark.slow
@pytest.mark.parametrize("wider", [0, 1, 30])
@pytest.mark.parametrize("n", [64, 320])
@folded("p", range(5, 13))
def test_larger_ranks_exceed_the_level_no_more_often(n, p, wider):
    share = (largest_cosines(n, p, p + wider) > chance_level(n, p, p + wider)).mean()
    assert 0.003 < share < 0.0115


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 5), (2, 2), (3, 9), (4, 4)], ids=str)
def test_the_distribution_function_is_that_of_random_subspaces(ranks):
    found = largest_cosines(40, *ranks, runs=4000)
    law = np.vectorize(lambda x: largest_cosine_cdf(40, *ranks, x))
    assert scipy.stats.kstest(found, law).pvalue > 1e-4


@pytest.mark.parametrize("q", [4, 64, 1024])
@pytest.mark.parametrize("n", [2100, 16384])
def test_quantiles_are_where_the_distribution_function_says(n, q):
    for p in range(1, LARGEST_EXACT + 1):
        for level in (0.5, 0.99):
            x = largest_cosine_quantile(n, p, q, level)
            assert largest_cosine_cdf(n, p, q, x) == pytest.approx(level, abs=1e-5)
            assert largest_cosine_cdf(n, p, q, 0.98 * x) < level


def test_the_level_grows_with_the_ranks_where_the_law_changes():
    levels = [chance_level(320, p, 8) for p in range(1, 9)]
    assert levels == sorted(levels)


def with_many_digits(n, p, q, x):
    """The distribution function by the same determinant, in 80 digits."""
    mpmath.mp.dps = 80
    a = [mpmath.mpf(q - p + 1) / 2 + i for i in range(p)]
    b = mpmath.mpf(n - q - p + 1) / 2

    def squared(x):
        below = [mpmath.betainc(ai, b, 0, x, regularized=True) for ai in a]
        D = mpmath.zeros(p + p % 2)
        for j in range(p):
            ordered = below[j] ** 2 / 2
            for i in range(j, p - 1):
                scale = mpmath.beta(a[i], b) * mpmath.beta(a[j], b) * a[i]
                ordered -= mpmath.betainc(a[i] + a[j], 2 * b, 0, x) / scale
                D[i + 1, j] = 2 * ordered - below[i + 1] * below[j]
        for i in range(p) if p % 2 else ():
            D[p, i] = below[i]
        return mpmath.det(D - D.T)

    return float(mpmath.sqrt(squared(mpmath.mpf(x)) / squared(mpmath.mpf(1))))


@pytest.mark.parametrize("p", range(1, LARGEST_EXACT + 1))
@folded("q", [4, 64, 1024])
@folded("n", [2100, 16384])
def test_float64_loses_less_than_two_millionths(n, p, q):
    x = 0.98 * chance_level(n, p, q)
    assert largest_cosine_cdf(n, p, q, x) == pytest.approx(with_many_digits(n, p, q, x), abs=2e-6)
