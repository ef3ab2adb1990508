"""Products of thin factors, against the dense product in float64."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from devec.linalg.factors import (
    _column_space_by_gram,
    _column_space_by_qr,
    column_space,
    eig,
    product_inner,
    product_norm,
    product_svd,
    rank_for_energy,
)


def factors(m=37, n=23, r=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return B.to(dtype), A.to(dtype)


def dense(B, A):
    return B.double() @ A.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "n", "r"), [(37, 23, 5), (4, 50, 6), (50, 4, 6), (3, 3, 3), (9, 7, 1)]
)
def test_column_space_is_that_of_the_dense_product(m, n, r, dtype):
    B, A = factors(m, n, r, dtype)
    U, S = column_space(B, A)
    want_U, want_S, _ = torch.linalg.svd(dense(B, A), full_matrices=False)
    rank = min(m, n, r)
    assert S.shape == (rank,)
    assert_close(S, want_S[:rank], rtol=1e-10, atol=0)
    assert_close(U.mT @ U, torch.eye(rank, dtype=U.dtype), rtol=0, atol=1e-12)
    assert_close(U @ U.mT, (want_U[:, :rank] @ want_U[:, :rank].mT), rtol=0, atol=1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e12])
def test_column_space_of_ill_conditioned_factors(condition):
    B, A = factors(60, 40, 6, torch.float64)
    scales = torch.logspace(0, -np.log10(condition), 6, dtype=torch.float64)
    U, S = column_space(B * scales, A)
    kept = len(S)
    # The basis is as good as the data allows: eps times the condition number of what is kept.
    span = torch.linalg.qr(B[:, :kept]).Q
    worst = 1e-14 * condition
    assert kept == (6 if condition <= 1e8 else kept)
    assert_close(U.mT @ U, torch.eye(kept, dtype=U.dtype), rtol=0, atol=1e-12)
    assert float(torch.linalg.matrix_norm(span - U @ (U.mT @ span))) < max(worst, 1e-12)


def test_both_routes_to_the_column_space_agree():
    B, A = factors(60, 40, 6, torch.float64)
    gram = _column_space_by_gram(B, A @ A.mT)
    qr = _column_space_by_qr(B, A, 1e-12)
    assert_close(gram.S, qr.S, rtol=1e-12, atol=0)
    assert_close(gram.U @ gram.U.mT, qr.U @ qr.U.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["B", "A", "both"])
def test_rank_deficient_factors_have_their_true_rank(where):
    B, A = factors(30, 20, 6)
    if where in ("B", "both"):
        B[:, 3] = 2 * B[:, 0]
    if where in ("A", "both"):
        A[5] = A[1] - A[2]
    U, S = column_space(B, A)
    rank = 4 if where == "both" else 5
    assert U.shape == (30, rank)
    left = torch.linalg.svd(dense(B, A)).U[:, :rank]
    assert_close(U @ U.mT, left @ left.mT, rtol=0, atol=1e-6)
    assert len(S) == rank


def test_zero_and_empty_products_have_no_column_space():
    for B, A in (
        (torch.zeros(8, 3), torch.ones(3, 5)),
        (torch.ones(8, 3), torch.zeros(3, 5)),
        (torch.zeros(8, 0), torch.zeros(0, 5)),
    ):
        U, S = column_space(B, A)
        assert U.shape == (8, 0)
        assert S.shape == (0,)
        assert product_norm(B, A) == 0.0


def test_gauge_does_not_matter():
    B, A = factors(dtype=torch.float64)
    G = torch.randn(5, 5, dtype=torch.float64) + 3 * torch.eye(5)
    U1, S1 = column_space(B, A)
    U2, S2 = column_space(B @ G, torch.linalg.solve(G, A))
    assert_close(S1, S2, rtol=1e-10, atol=0)
    assert_close(U1 @ U1.mT, U2 @ U2.mT, rtol=0, atol=1e-10)


def test_product_svd_is_the_dense_svd():
    B, A = factors()
    U, S, Vh = product_svd(B, A)
    assert_close(U * S @ Vh, dense(B, A), rtol=1e-10, atol=1e-12)
    assert_close(S, torch.linalg.svdvals(dense(B, A))[:5], rtol=1e-10, atol=1e-14)


def test_inner_product_and_norm_are_the_dense_ones():
    B1, A1 = factors(seed=1)
    B2, A2 = factors(r=3, seed=2)
    want = float((dense(B1, A1) * dense(B2, A2)).sum())
    assert product_inner(B1, A1, B2, A2) == pytest.approx(want, rel=1e-12)
    assert product_norm(B1, A1) == pytest.approx(float(dense(B1, A1).norm()), rel=1e-12)


def test_norm_survives_cancellation():
    B, A = factors(dtype=torch.float64)
    tiny = 1e-11 * torch.randn_like(B)
    norm = product_norm(torch.cat([B + tiny, -B], 1), torch.cat([A, A]))
    rounded = ((B + tiny) - B) @ A
    assert norm == pytest.approx(float(rounded.norm()), rel=1e-3)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_rank_for_energy_is_the_smallest_that_holds_it(energy):
    S = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    rank = rank_for_energy(S, energy)
    held = S.square().cumsum(0) / S.square().sum()
    assert held[rank - 1] >= energy - 1e-12
    assert rank == 1 or held[rank - 2] < energy


def test_rank_for_energy_of_nothing_is_zero():
    assert rank_for_energy(torch.zeros(3), 1.0) == 0


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_an_ill_conditioned_gauge_does_not_matter(condition):
    B, A = factors(dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(5, 5).double()).Q,
        torch.linalg.qr(torch.randn(5, 5).double()).Q,
    )
    scales = torch.logspace(0, -np.log10(condition), 5, dtype=torch.float64)
    U1, S1 = column_space(B, A)
    U2, S2 = column_space(B @ (left * scales @ right), right.mT @ (left / scales).mT @ A)
    assert_close(S1, S2, rtol=1e-8, atol=0)
    assert_close(U1 @ U1.mT, U2 @ U2.mT, rtol=0, atol=1e-7)
    assert_close(U2.mT @ U2, torch.eye(5, dtype=U2.dtype), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 5), (7, 5, 5), (3, 80, 80)])
@pytest.mark.parametrize("threads", [1, 2])
def test_eigenvalues_are_found_matrix_by_matrix_and_threads_are_left_as_they_were(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        M = torch.randn(shape, dtype=torch.float64)
        values, V = eig(M)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_close(M.to(V) @ V, V * values[..., None, :])
