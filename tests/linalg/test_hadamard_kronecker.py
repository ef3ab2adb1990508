"""Products of low-rank matrices as one pair of factors, against the dense product in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from devec.errors import IncompatibleError
from devec.linalg.hadamard_kronecker import hadamard_product, kronecker_product
from support.checks.never_dense import Watch
from support.folding import folded
from support.shape_checks import unchecked

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}


def gaussian(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(m, n, r, dtype=torch.float64, seed=0, decay=1.0):
    """Factors of an m × n matrix whose terms shrink by `decay`."""
    scales = decay ** torch.arange(r, dtype=torch.float64)
    B = gaussian(m, r, seed=2 * seed) * scales
    return B.to(dtype), gaussian(r, n, dtype=dtype, seed=2 * seed + 1)


def two_pairs(m, n, r1, r2, dtype=torch.float64, decay=1.0):
    return *pair(m, n, r1, dtype, 1, decay), *pair(m, n, r2, dtype, 2, decay)


def multiplied(operand):
    if isinstance(operand, tuple):
        return multiplied(operand[0]) @ multiplied(operand[1])
    return operand.double().numpy()


def dense_hadamard(B1, A1, B2, A2):
    return multiplied((B1, A1)) * multiplied((B2, A2))


def dense_kronecker(left, right):
    return np.kron(multiplied(left), multiplied(right))


def dense_error(result, want):
    """Relative Frobenius error, 0 for a zero matrix that is met."""
    lost = np.linalg.norm(multiplied((result.B, result.A)) - want)
    return lost / (np.linalg.norm(want) or 1.0)


def least_error(want, rank):
    """Eckart and Young."""
    S = np.linalg.svd(want, compute_uv=False)
    return np.linalg.norm(S[rank:]) / (np.linalg.norm(S) or 1.0)


def assert_exact(result, want):
    assert result.error == 0.0
    assert (result.B.shape[0], result.A.shape[1]) == want.shape
    assert dense_error(result, want) < ROUNDING[result.B.dtype]


def assert_best(result, want, rank, slack):
    """At most `slack` above the least error of that rank, and said so."""
    tolerance = ROUNDING[result.B.dtype]
    assert result.B.shape == (want.shape[0], rank)
    assert result.A.shape == (rank, want.shape[1])
    assert result.error == pytest.approx(dense_error(result, want), rel=1e-9, abs=tolerance)
    assert result.error <= slack * least_error(want, rank) + tolerance


@pytest.mark.parametrize(("m", "n"), [(37, 23), (9, 50), (1, 6)])
@folded("dtype", DTYPES)
@folded(("r1", "r2"), [(3, 4), (1, 1), (1, 5)])
def test_hadamard_product_is_exact_where_the_rank_allows(m, n, r1, r2, dtype):
    factors = two_pairs(m, n, r1, r2, dtype)
    result = hadamard_product(*factors, max_rank=r1 * r2)
    assert result.B.shape[1] == r1 * r2
    assert result.B.dtype == result.A.dtype == torch.promote_types(dtype, torch.float32)
    assert_exact(result, dense_hadamard(*factors))


@pytest.mark.parametrize(("m", "n"), [(40, 15), (15, 40), (15, 15), (300, 15), (15, 300)])
@folded("dtype", DTYPES)
@folded("max_rank", [15, 24])
def test_hadamard_product_is_exact_at_the_shorter_side(m, n, max_rank, dtype):
    factors = two_pairs(m, n, 5, 5, dtype)
    result = hadamard_product(*factors, max_rank=max_rank)
    assert result.B.shape[1] == 15
    assert_exact(result, dense_hadamard(*factors))


@pytest.mark.parametrize("n", [200, 60, 30])  # by SVD, by the range finder, by a whole basis
@folded("dtype", DTYPES)
@folded("max_rank", [9, 20])
def test_hadamard_product_of_redundant_factors_is_exact_at_its_numerical_rank(n, max_rank, dtype):
    B1, A1, B2, A2 = two_pairs(n, n, 3, 3, dtype)
    factors = torch.cat([B1, B1], 1), torch.cat([A1, -2 * A1]), B2.repeat(1, 2), A2.repeat(2, 1)
    result = hadamard_product(*factors, max_rank=max_rank)
    assert result.B.shape[1] == 9
    assert_exact(result, dense_hadamard(*factors))


@pytest.mark.parametrize("max_rank", [1, 7, 20])
@folded("dtype", DTYPES)
def test_truncation_of_thin_hadamard_factors_is_optimal(max_rank, dtype):
    factors = two_pairs(90, 70, 5, 6, dtype)
    result = hadamard_product(*factors, max_rank=max_rank)
    assert_best(result, dense_hadamard(*factors), max_rank, slack=1 + 1e-9)


@pytest.mark.parametrize(("m", "n", "r"), [(300, 200, 20), (200, 300, 13), (500, 400, 32)])
@pytest.mark.parametrize("max_rank", [1, 8, 30, 100])
@folded("dtype", [torch.float32, torch.float64])
def test_range_finder_is_within_a_percent_of_the_least_error(m, n, r, max_rank, dtype):
    factors = two_pairs(m, n, r, r, dtype)
    result = hadamard_product(*factors, max_rank=max_rank)
    assert_best(result, dense_hadamard(*factors), max_rank, slack=1.01)


@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.5), (torch.float64, 0.3)])
@pytest.mark.parametrize("max_rank", [5, 20, 40, 60])
def test_range_finder_is_near_optimal_on_falling_spectra_too(max_rank, dtype, decay):
    factors = two_pairs(300, 200, 12, 12, dtype, decay)
    result = hadamard_product(*factors, max_rank=max_rank)
    assert_best(result, dense_hadamard(*factors), max_rank, slack=1.01)


def test_range_finder_is_the_same_each_time_and_leaves_the_random_state_alone():
    factors = two_pairs(100, 80, 12, 12)
    state = torch.get_rng_state()
    first = hadamard_product(*factors, max_rank=10)
    torch.randn(3)
    second = hadamard_product(*factors, max_rank=10)
    torch.set_rng_state(state)
    hadamard_product(*factors, max_rank=10)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)
    assert first.error == second.error > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("max_rank", [1, 10, 35])
def test_truncated_factors_are_balanced(max_rank):
    left = hadamard_product(*two_pairs(70, 60, 6, 6), max_rank=max_rank)
    right = kronecker_product(gaussian(6, 7), gaussian(9, 8), max_rank=max_rank)
    for result in (left, right):
        gram = result.B.mT @ result.B
        assert_close(gram, result.A @ result.A.mT, rtol=1e-9, atol=1e-9)
        assert_close(gram, torch.diag(gram.diag()), rtol=1e-9, atol=1e-9)


KRONECKER = {
    "full, full": (gaussian(4, 5), gaussian(7, 6)),
    "tall, wide": (gaussian(9, 3), gaussian(2, 11)),
    "full, pair": (gaussian(4, 5), pair(9, 12, 3)),
    "pair, full": (pair(9, 12, 3), gaussian(4, 5)),
    "pair, pair": (pair(9, 12, 3), pair(10, 8, 4)),
    "row, column": (gaussian(1, 20), gaussian(15, 1)),
    "pair of excess rank": (pair(3, 4, 9), gaussian(5, 6)),
    "two pairs of excess rank": (pair(3, 4, 9), pair(6, 5, 7)),
}
RANK = dict(zip(KRONECKER, (24, 6, 12, 12, 12, 1, 15, 15), strict=True))


def cast(operand, dtype):
    return tuple(t.to(dtype) for t in operand) if isinstance(operand, tuple) else operand.to(dtype)


@pytest.mark.parametrize("name", KRONECKER)
@folded("dtype", DTYPES)
def test_kronecker_product_is_exact_where_the_rank_allows(name, dtype):
    operands = [cast(operand, dtype) for operand in KRONECKER[name]]
    result = kronecker_product(*operands, max_rank=RANK[name])
    assert result.B.shape[1] == RANK[name]
    assert result.B.dtype == result.A.dtype == torch.promote_types(dtype, torch.float32)
    assert_exact(result, dense_kronecker(*operands))


@pytest.mark.parametrize("name", [name for name in KRONECKER if RANK[name] > 11])
@folded("dtype", DTYPES)
@folded("less", [1, 3, 5, 11])
def test_truncated_kronecker_product_is_optimal(name, less, dtype):
    operands = [cast(operand, dtype) for operand in KRONECKER[name]]
    rank = RANK[name] - less
    result = kronecker_product(*operands, max_rank=rank)
    want = dense_kronecker(*operands)
    assert_best(result, want, rank, slack=1 + 1e-6)
    assert result.error == pytest.approx(least_error(want, rank), rel=1e-6)


def test_kronecker_product_beyond_the_rank_allowed_is_exact_at_its_numerical_rank():
    low = gaussian(9, 2) @ gaussian(2, 8)
    result = kronecker_product(low, gaussian(3, 4), max_rank=10)
    assert result.B.shape == (27, 6)
    assert_exact(result, dense_kronecker(low, gaussian(3, 4)))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@folded("max_rank", [1, 10, 40, 100])
def test_zero_products_keep_a_column(side, max_rank):
    B1, A1, B2, A2 = two_pairs(50, 40, 7, 7)
    B1, B2 = (B * (side == other) for B, other in ((B1, "right"), (B2, "left")))
    result = hadamard_product(B1, A1, B2, A2, max_rank=max_rank)
    assert_exact(result, np.zeros((50, 40)))
    assert 1 <= result.B.shape[1] <= max_rank
    result = kronecker_product((B1, A1), B2, max_rank=max_rank)
    assert_exact(result, np.zeros((2500, 280)))
    assert 1 <= result.B.shape[1] <= max_rank


def strided(tensor):
    """The same values at other strides: every second column of a transposed copy."""
    wide = torch.zeros(2 * tensor.shape[1], tensor.shape[0], dtype=tensor.dtype)
    wide[::2] = tensor.mT
    return wide[::2].mT


@pytest.mark.parametrize("max_rank", [3, 30, 64])
def test_strides_do_not_matter(max_rank):
    factors = two_pairs(40, 32, 8, 8)
    B1, A1, _, _ = factors
    for call, operands in (
        (hadamard_product, factors),
        (kronecker_product, (B1, A1)),
    ):
        want = call(*operands, max_rank=max_rank)
        got = call(*map(strided, operands), max_rank=max_rank)
        assert_close(got.B @ got.A, want.B @ want.A, rtol=1e-9, atol=1e-9)
    expanded = gaussian(1, 5).expand(6, 5)
    result = kronecker_product(expanded, B1.mT, max_rank=max_rank)
    assert dense_error(result, dense_kronecker(expanded, B1.mT)) == pytest.approx(
        result.error, abs=1e-13
    )


SIZE = st.integers(1, 24)


@given(m=SIZE, n=SIZE, r1=st.integers(1, 6), r2=st.integers(1, 6), max_rank=st.integers(1, 40))
def test_hadamard_product_of_any_shape_is_near_the_best(m, n, r1, r2, max_rank):
    factors = two_pairs(m, n, r1, r2)
    want = dense_hadamard(*factors)
    result = hadamard_product(*factors, max_rank=max_rank)
    rank = result.B.shape[1]
    assert rank <= max_rank
    assert rank == r1 * r2 or rank <= min(m, n)
    assert_best(result, want, rank, slack=1.01)
    assert result.error <= 1.01 * least_error(want, max_rank) + 1e-12


@given(
    shapes=st.tuples(*[st.integers(1, 7)] * 4),
    ranks=st.tuples(*[st.none() | st.integers(1, 9)] * 2),
    max_rank=st.integers(1, 40),
)
def test_kronecker_product_of_any_operands_is_the_best(shapes, ranks, max_rank):
    a, b, c, d = shapes
    left, right = (
        gaussian(m, n) if r is None else pair(m, n, r)
        for (m, n), r in zip(((a, b), (c, d)), ranks, strict=True)
    )
    want = dense_kronecker(left, right)
    result = kronecker_product(left, right, max_rank=max_rank)
    rank = result.B.shape[1]
    assert rank <= min(max_rank, min(a, b) * min(c, d))
    assert_best(result, want, rank, slack=1 + 1e-6)
    assert result.error <= (1 + 1e-6) * least_error(want, max_rank) + 1e-12


MISFITS = {
    "one inner rank": ((8, 3), (2, 5), (8, 2), (2, 5)),
    "of one shape": ((8, 3), (3, 5), (8, 2), (2, 6)),
    "not a matrix": ((8, 3), (3, 5), (8, 2), (2, 5, 1)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_hadamard_product_of_misfits_is_refused(name):
    shapes = MISFITS[name]
    with unchecked(), pytest.raises(IncompatibleError, match="matri") as caught:
        hadamard_product(*(torch.ones(shape) for shape in shapes), max_rank=4)
    assert any(str(shape) in str(caught.value) for shape in (*shapes, (8, 6)))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((8,), (3, 4), r"left operand: shape \(8,\)"),
        ((3, 4), (2, 3, 4), r"right operand: shape \(2, 3, 4\)"),
        (((8, 3), (2, 5)), (3, 4), r"left operand: factors disagree, B \(8, 3\)"),
        ((3, 4), ((8, 3), (3,)), r"right operand: factors disagree.*A \(3,\)"),
    ],
)
def test_kronecker_product_of_misfits_is_refused(left, right, message):
    operands = [
        tuple(map(torch.ones, o)) if isinstance(o[0], tuple) else torch.ones(o)
        for o in (left, right)
    ]
    with unchecked(), pytest.raises(IncompatibleError, match=message):
        kronecker_product(*operands, max_rank=4)


@pytest.mark.parametrize("max_rank", [0, -1])
def test_a_rank_that_holds_nothing_is_refused(max_rank):
    with pytest.raises(IncompatibleError, match=f"max_rank must be at least 1, got {max_rank}"):
        hadamard_product(*two_pairs(8, 6, 2, 2), max_rank=max_rank)
    with pytest.raises(IncompatibleError, match=f"max_rank must be at least 1, got {max_rank}"):
        kronecker_product(gaussian(3, 4), gaussian(5, 6), max_rank=max_rank)


UNFORMED = {
    "hadamard exact": lambda: hadamard_product(*two_pairs(300, 200, 6, 6), max_rank=36),
    "hadamard by SVD": lambda: hadamard_product(*two_pairs(300, 200, 8, 15), max_rank=20),
    "hadamard by range finder": lambda: hadamard_product(*two_pairs(300, 200, 12, 12), 20),
    "hadamard wide": lambda: hadamard_product(*two_pairs(200, 300, 32, 32), 100),
    "kronecker exact": lambda: kronecker_product(gaussian(12, 10), pair(25, 20, 4), 40),
    "kronecker full": lambda: kronecker_product(gaussian(12, 10), gaussian(25, 20), 150),
    "kronecker pairs": lambda: kronecker_product(pair(12, 10, 8), pair(25, 20, 18), 50),
}


@pytest.mark.parametrize("name", UNFORMED)
def test_the_product_is_never_formed(name):
    with Watch(300 * 200):
        result = UNFORMED[name]()
    assert {result.B.shape[0], result.A.shape[1]} == {300, 200}
