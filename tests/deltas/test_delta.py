"""Deltas are a vector space."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from devec import Delta, DevecError
from devec.linalg.batched import factored_svd
from support.adapters.cases import dense, relative_error
from support.shape_checks import unchecked

weights = st.floats(-4, 4, allow_nan=False).filter(lambda w: abs(w) > 1e-3)
seeds = st.integers(0, 1000)


def make(seed, rank=3, scaling=0.7, bias=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(9, rank, generator=g, dtype=torch.float64).to(dtype)
    A = torch.randn(rank, 7, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(9, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return Delta(B, A, scaling, b)


def bias_of(delta):
    return torch.zeros(9).double() if delta.bias is None else delta.scaling * delta.bias.double()


@given(seeds, seeds, weights, weights)
def test_linear_combinations_are_the_dense_ones(i, j, v, w):
    a, b = make(i), make(j, rank=2, scaling=-1.3, bias=False)
    combined = v * a - b * w
    assert relative_error(dense(combined), v * dense(a) - w * dense(b)) < 1e-12
    assert_close(bias_of(combined), v * bias_of(a) - w * bias_of(b), rtol=1e-12, atol=1e-12)


@given(seeds, seeds, seeds, weights)
def test_vector_space_laws(i, j, k, w):
    a, b, c = make(i), make(j, scaling=2.0), make(k, rank=1)
    scale = a.norm() + b.norm() + c.norm()
    assert (((a + b) + c) - (a + (b + c))).norm() < 1e-12 * scale
    assert ((a + b) - (b + a)).norm() < 1e-12 * scale
    assert (w * (a + b) - (w * a + w * b)).norm() < 1e-12 * scale * abs(w)
    assert (a - a).norm() < 1e-13 * scale
    assert (a / w - (1 / w) * a).norm() < 1e-13 * scale / abs(w)


@given(seeds, seeds)
def test_inner_product_and_norm_are_the_dense_ones(i, j):
    a, b = make(i), make(j, rank=4, scaling=-0.2)
    want = (dense(a) * dense(b)).sum() + float(bias_of(a) @ bias_of(b))
    assert a.inner(b) == pytest.approx(want, rel=1e-10, abs=1e-10)
    assert a.norm() == pytest.approx(math.sqrt(a.inner(a)), rel=1e-12)


def test_projection_and_rest_are_orthogonal_and_add_up():
    a = make(0, dtype=torch.float32)
    Z = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    shared = a.projected(Z)
    unique = a.without(shared)
    P = (Z @ Z.mT).numpy()
    assert relative_error(dense(shared), P @ dense(a)) < 1e-6
    assert relative_error(dense(shared) + dense(unique), dense(a)) < 1e-6
    assert abs(Z.numpy().T @ dense(unique)).max() < 1e-6
    assert (shared.rank, shared.scaling, shared.A is a.A) == (a.rank, a.scaling, True)
    assert_close(bias_of(shared) + bias_of(unique), bias_of(a), rtol=1e-6, atol=1e-6)


def test_scaling_keeps_rank_and_scaling_and_folding_keeps_the_effect():
    a = make(0)
    assert (2 * a).scaling == a.scaling
    assert (2 * a).rank == a.rank
    assert a.folded().scaling == 1
    assert relative_error(dense(a.folded()), dense(a)) < 1e-14


@pytest.mark.parametrize("scaling", [0.5, -0.5])
def test_the_factored_svd_is_that_of_the_dense_delta(scaling):
    a = make(0, scaling=scaling)
    found = factored_svd(a.folded().B, a.A)
    B, A = found.leading(a.rank)
    assert relative_error((B @ A).numpy(), dense(a)) < 1e-12
    assert_close(found.S, torch.linalg.svdvals(torch.from_numpy(dense(a)))[: a.rank])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_combined_in_float32(dtype):
    a, b = make(0, dtype=dtype), make(1, dtype=dtype)
    combined = 0.1 * a + 0.3 * b
    assert combined.B.dtype == torch.float32
    assert relative_error(dense(combined), 0.1 * dense(a) + 0.3 * dense(b)) < 1e-6


@pytest.mark.parametrize(
    ("B", "A", "bias"),
    [
        (torch.ones(4, 2), torch.ones(3, 5), None),
        (torch.ones(4, 2), torch.ones(2, 5, 1), None),
        (torch.ones(4, 2), torch.ones(2, 5), torch.ones(3)),
    ],
)
def test_shapes_that_disagree_are_refused(B, A, bias):
    with unchecked(), pytest.raises(DevecError, match=r"disagree|has shape"):
        Delta(B, A, 1.0, bias)


def test_deltas_of_different_shapes_do_not_add():
    other = Delta(torch.ones(9, 2), torch.ones(2, 8))
    with pytest.raises(DevecError, match=r"\(9, 7\) and \(9, 8\)"):
        make(0) + other
    with pytest.raises(DevecError, match=r"\(9, 7\) and \(9, 8\)"):
        make(0).inner(other)
