"""All ways to merge have the error that is optimal; the formulas of the benchmarks are right."""

import pytest
import torch
from benchmarks import llama, merges, scaling
from benchmarks.pools import in_memory

WEIGHTS = (1.0, 0.7, -0.4)


@pytest.fixture(scope="module")
def adapters():
    return in_memory(3, {merges.MODULE: (40, 56)}, rank=8)


def dense(adapters):
    found = (adapter.modules[merges.MODULE] for adapter in adapters)
    return sum(
        w * d.scaling * d.B.double() @ d.A.double() for w, d in zip(WEIGHTS, found, strict=True)
    )


def test_the_optimal_error_is_that_of_the_dense_svd(adapters):
    S = torch.linalg.svdvals(dense(adapters))
    expected = float(S[8:].norm() / S.norm())
    assert merges.optimal_error(adapters, WEIGHTS, 8) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("way", [merges.by_devec, merges.by_qr, merges.by_core_space])
def test_every_way_is_optimal(adapters, way):
    found = way(adapters, WEIGHTS, 8)
    assert found[0].shape == (40, 8)
    error = merges.relative_error(adapters, WEIGHTS, found)
    assert error == pytest.approx(merges.optimal_error(adapters, WEIGHTS, 8), rel=1e-5)


def test_peft_is_optimal_again_and_again(adapters):
    peft = merges.ByPeft(adapters)
    for _ in range(2):
        error = merges.relative_error(adapters, WEIGHTS, peft(peft.names, WEIGHTS, 8))
        assert error == pytest.approx(merges.optimal_error(adapters, WEIGHTS, 8), rel=1e-5)


def test_peft_truncates_one_adapter_only_if_it_is_given_twice(adapters):
    peft = merges.ByPeft(adapters[:1])
    assert peft(peft.names, [1.0], 2)[0].shape[1] == 8
    found = peft(2 * peft.names, [0.5, 0.5], 2)
    assert found[0].shape[1] == 2
    error = merges.relative_error(adapters[:1], [1.0], found)
    assert error == pytest.approx(merges.optimal_error(adapters[:1], [1.0], 2), rel=1e-5)


def test_the_relative_error_is_dense_over_all_rows(adapters, monkeypatch):
    monkeypatch.setattr(merges, "ROWS", 7)
    B, A = merges.by_qr(adapters, WEIGHTS, 3)
    off = dense(adapters) - B.double() @ A.double()
    expected = float(off.norm() / dense(adapters).norm())
    assert merges.relative_error(adapters, WEIGHTS, (B, A)) == pytest.approx(expected, rel=1e-12)


def test_operations_are_counted_as_by_hand():
    """out = 5, in = 3, r = 2, k = 2, ρ = 1, product by product."""
    AAt, BtB, basis, overlap = 2 * 2 * 3 * 2, 2 * 2 * 5 * 2, 2 * 5 * 2 * 2, 2 * 2 * 5 * 2
    ZtB, ZZtB, ZtBA = 2 * 1 * 5 * 2, 2 * 5 * 1 * 2, 2 * 1 * 2 * 3
    expected = 2 * (AAt + BtB + basis + overlap + ZtB + ZZtB + ZtBA)
    assert llama.tall_flops(5, 3, 2, 2, 1) == expected == 392


def test_a_line_is_linear_and_a_square_is_not():
    assert scaling.deviation({k: 3 + 2 * k for k in (2, 4, 8)}) < 1e-12
    assert scaling.deviation({1: 1.0, 2: 4.0, 3: 9.0}) > 0.15
