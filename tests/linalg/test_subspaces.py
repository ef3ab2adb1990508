"""Shared subspaces: planted ones are found, projectors are projectors, chance is chance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from devec.errors import IncompatibleError
from devec.linalg.chance import chance_level, random_edge
from devec.linalg.subspaces import METHODS, chain, deflate, mean, principal, principal_vectors
from support.truth import reference


def orthonormal(n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q


def planted(n=60, ranks=(8, 6, 7), shared=3, noise=0.0, seed=0):
    """Subspaces with a planted common part, each known only up to noise."""
    common = orthonormal(n, shared, seed)
    bases = []
    for i, r in enumerate(ranks):
        generator = torch.Generator().manual_seed(100 * seed + i + 1)
        jitter = torch.randn(n, shared, generator=generator, dtype=torch.float64) / math.sqrt(n)
        own = torch.randn(n, r - shared, generator=generator, dtype=torch.float64)
        bases.append(torch.linalg.qr(torch.cat([common + noise * jitter, own], 1)).Q)
    return bases, common


def projector(Z):
    return Z @ Z.mT


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("ranks", [(8, 6), (8, 6, 7), (5, 5, 5, 5, 5)])
def test_planted_subspaces_are_found_exactly_without_noise(method, ranks):
    bases, common = planted(ranks=ranks)
    found = METHODS[method](bases, 0.999)
    assert_close(projector(found.basis), projector(common), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_shared_projector_is_an_orthogonal_projector(method, threshold, k):
    bases, _ = planted(ranks=(8, 6, 7, 5, 9)[:k], noise=0.4)
    P = projector(METHODS[method](bases, threshold).basis)
    assert_close(P @ P, P, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.85])
def test_agrees_with_the_dense_reference(method, k, threshold):
    bases, _ = planted(ranks=(8, 6, 7, 5, 9)[:k], noise=0.3, seed=k)
    found = METHODS[method](bases, threshold)
    want = reference.BASES[method]([b.numpy() for b in bases], threshold)
    assert found.rank == want.shape[1]
    assert_close(projector(found.basis), torch.from_numpy(want @ want.T), rtol=0, atol=1e-9)


def test_complex_eigenvalues_of_a_chain_give_a_real_basis():
    # Three complex lines as real planes: the chain has the eigenvalue <u,v><v,w><w,u>, whose phase
    # is the area of the triangle they span, and its conjugate. Beside it a real shared direction.
    lines = torch.tensor([[1, 0, 0], [0.9, 0.3j, 0.1], [0.9, 0.3, 0.1]], dtype=torch.complex128)
    bases = []
    for v in lines / torch.linalg.vector_norm(lines, dim=1, keepdim=True):
        plane = torch.stack([torch.cat([v.real, v.imag]), torch.cat([-v.imag, v.real])], 1)
        bases.append(torch.block_diag(plane, torch.ones(1, 1).double()))
    product = projector(bases[0]) @ projector(bases[1]) @ projector(bases[2])
    values = torch.linalg.eigvals(product)
    turning = values[values.imag.abs() > 1e-3]
    assert len(turning) == 2
    found = chain(bases, float(turning.real[0]) - 1e-6)
    assert found.rank == 3
    P = projector(found.basis)
    assert_close(P @ P, P, rtol=0, atol=1e-12)
    # the span is invariant under the chain
    assert_close(P @ product @ found.basis, product @ found.basis, rtol=0, atol=1e-12)
    assert_close(found.spectrum[1:], turning.real, rtol=1e-12, atol=0)


@given(st.permutations(range(4)))
def test_mean_does_not_depend_on_the_order(order):
    bases, _ = planted(ranks=(8, 6, 7, 5), noise=0.4)
    one = mean(bases, 0.5)
    other = mean([bases[i] for i in order], 0.5)
    assert_close(projector(one.basis), projector(other.basis), rtol=0, atol=1e-10)
    assert_close(one.spectrum, other.spectrum, rtol=0, atol=1e-12)


def test_chain_depends_on_the_order_for_three():
    bases, _ = planted(noise=0.6)
    one, other = chain(bases, 0.3), chain([bases[1], bases[0], bases[2]], 0.3)
    assert float((projector(one.basis) - projector(other.basis)).norm()) > 1e-2


@given(st.integers(0, 10_000), st.floats(0.05, 0.99))
def test_for_two_subspaces_all_methods_select_the_same_pairs(seed, threshold):
    bases, _ = planted(ranks=(7, 5), noise=0.7, seed=seed)
    ranks = {name: method(bases, threshold).rank for name, method in METHODS.items()}
    assert len(set(ranks.values())) == 1
    bisectors = mean(bases, threshold).basis
    f, _, g = principal_vectors(*bases)
    both = (f + g)[:, : bisectors.shape[1]]
    both = both / both.norm(dim=0)
    assert_close(projector(bisectors), projector(both), rtol=0, atol=1e-8)


def test_the_spectrum_of_mean_is_on_the_scale_of_squared_cosines():
    # k directions with pairwise cosine c
    for k, c in ((2, 0.9), (3, 0.7), (5, 0.5)):
        gram = torch.full((k, k), c, dtype=torch.float64).fill_diagonal_(1)
        vectors = torch.linalg.cholesky(gram).mT  # columns of pairwise inner product c
        spectrum = mean([v[:, None] for v in vectors.mT], 0.99).spectrum
        assert float(spectrum[0]) == pytest.approx(c**2, abs=1e-12)


def test_principal_is_for_two_subspaces():
    bases, _ = planted()
    with pytest.raises(IncompatibleError, match=r"two subspaces, not 3.*'mean'"):
        principal(bases, 0.85)


def test_threshold_one_selects_what_is_exactly_shared():
    bases, _ = planted(ranks=(8, 6), shared=3)
    assert chain(bases, 1.0).rank == 3
    assert mean(bases, 1.0).rank == 3


def test_deflation_removes_directions_of_the_target_one_by_one():
    bases, _ = planted(ranks=(8, 6, 7), noise=0.3)
    target, *others = bases
    steps = deflate(target, others, lambda _p, _q: 0.6)
    Z = torch.cat([step.basis for step in steps], 1)
    assert_close(Z.mT @ Z, torch.eye(Z.shape[1], dtype=Z.dtype), rtol=0, atol=1e-12)
    assert_close(projector(target) @ Z, Z, rtol=0, atol=1e-12)
    _, rest = reference.deflate(target.numpy(), [o.numpy() for o in others], 0.6)
    left = target - projector(Z) @ target
    assert_close(left, torch.from_numpy(rest), rtol=0, atol=1e-10)


def test_deflation_of_everything_leaves_nothing():
    bases, _ = planted(ranks=(3, 6, 7))
    steps = deflate(bases[0], bases[1:], lambda _p, _q: 0.85)
    assert [step.rank for step in steps] == [3, 0]


@pytest.mark.parametrize(("n", "p", "q"), [(1500, 100, 100), (1500, 200, 50)])
def test_random_subspaces_reach_the_edge(n, p, q):
    largest = [
        float(principal_vectors(orthonormal(n, p, 2 * s), orthonormal(n, q, 2 * s + 1))[1][0]) ** 2
        for s in range(5)
    ]
    assert np.mean(largest) == pytest.approx(random_edge(n, p, q), rel=0.05)


@pytest.mark.parametrize(("n", "p", "q"), [(200, 10, 10), (96, 8, 4)])
def test_random_subspaces_exceed_the_chance_level_in_one_case_of_a_hundred(n, p, q):
    level = chance_level(n, p, q)
    runs = 2000
    exceeding = sum(
        float(principal_vectors(orthonormal(n, p, 2 * s), orthonormal(n, q, 2 * s + 1))[1][0]) ** 2
        > level
        for s in range(runs)
    )
    # binomial with mean 20 and deviation 4.4
    assert 4 <= exceeding <= 40


def test_the_edge_grows_to_one_where_subspaces_must_meet():
    assert random_edge(10, 5, 5) == 1.0
    assert random_edge(10, 6, 7) == 1.0
    assert random_edge(10, 0, 7) == 0.0
    assert chance_level(10, 6, 7) == math.inf


@pytest.mark.parametrize("k", [3, 4, 6])
@pytest.mark.parametrize("method", ["chain", "mean"])
def test_random_pools_stay_below_the_level_of_a_pool(k, method):
    for seed in range(30):
        bases = [orthonormal(120, 6, 100 * seed + i) for i in range(k)]
        level = METHODS[method].bound(120, [6] * k, chance_level)
        assert METHODS[method](bases, level).rank == 0


def test_the_level_of_a_pool_of_two_is_that_of_the_pair():
    for method in METHODS:
        assert METHODS[method].bound(100, [7, 5], random_edge) == pytest.approx(
            random_edge(100, 7, 5)
        )
