"""Compressed adapters have the true rank: rounding is not worth a column."""

import dataclasses

import numpy as np
import pytest
import torch

from devec import Adapter, Delta, as_lora, combine, compress, decompose, distance, overlap
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Magnitude
from support.adapters.cases import dense, relative_error
from support.adapters.dense_doras import apart, low_rank, pool


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapter(seed, rank=4, dtype=torch.float32, name="a"):
    B, A = normal(32, rank, seed=seed, dtype=dtype), normal(rank, 28, seed=seed + 1, dtype=dtype)
    return Adapter(name, {"x": Delta(B, A, 0.5)})


WAYS = {
    "energy 1": {"energy": 1.0},
    "the rank of the factors": {"rank": 8},
    "a rank above it": {"rank": 100},
    "nearly all energy": {"energy": 1 - 1e-12},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factors_of_a_higher_rank_come_down_to_the_true_one(way, dtype):
    a = adapter(0, dtype=torch.float32 if dtype.itemsize == 2 else dtype)
    a = a.map(lambda _, d: dataclasses.replace(d, B=d.B.to(dtype), A=d.A.to(dtype)))
    for twice in (a + a, 3 * a - a, combine([a, a, a], [1, -1, 2])):
        result = compress(twice, **WAYS[way])
        delta = result.adapter.modules["x"]
        assert delta.rank == 4
        assert relative_error(dense(delta), dense(twice.modules["x"])) < 2e-6
        assert result.error < 2e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_leaves_nothing(way, dtype):
    a, b = adapter(0, dtype=dtype), adapter(10, dtype=dtype, name="b")
    b = b.map(lambda _, d: dataclasses.replace(d, B=1e-3 * d.B))
    result = compress(a - a, **WAYS[way])
    assert result.adapter.modules == {}
    assert result.error == 0
    rest = compress(a + b - a, **WAYS[way]).adapter.modules["x"]
    assert rest.rank == 4
    assert relative_error(dense(rest), dense(b.modules["x"])) < 1e-3


@pytest.mark.parametrize("G", [1e-6, 1e6])
@pytest.mark.parametrize("way", WAYS)
def test_how_the_factors_are_scaled_does_not_matter(way, G):
    """Columns of B may be long where rows of A are short: the product is as well-conditioned."""
    a = adapter(0)
    scales = torch.tensor([G, 1.0, 1 / G, 1.0])
    skew = a.map(lambda _, d: dataclasses.replace(d, B=d.B * scales, A=d.A / scales[:, None]))
    for one in (skew, skew + skew):
        assert compress(one, **WAYS[way]).adapter.modules["x"].rank == 4
    assert distance(compress(skew, **WAYS[way]).adapter, a) < 1e-5 * a.norm()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lower_ranks_are_optimal_as_before(rank):
    a = adapter(0) + adapter(2)
    result = compress(a, rank=rank)
    S = np.linalg.svd(dense(a.modules["x"]), compute_uv=False)
    assert result.adapter.modules["x"].rank == rank
    assert result.error == pytest.approx(np.linalg.norm(S[rank:]) / np.linalg.norm(S), rel=1e-6)


def test_the_nearest_lora_has_no_columns_of_rounding():
    """Magnitudes that are the norms in all rows but two: the change has rank two."""
    W, A = normal(32, 28, seed=5), normal(2, 28, seed=6)
    B = torch.zeros(32, 2)
    m = W.norm(dim=1)
    m[3], m[7] = 2 * m[3], 0.5 * m[7]
    gain = Magnitude(m, "out", HeldWeight(W, "base"))
    result = as_lora(Adapter("d", {"x": Delta(B, A, 1.0, None, gain)}), 8)
    delta = result.adapter.modules["x"]
    assert delta.rank == 2
    truth = np.zeros((32, 28))
    truth[3], truth[7] = W[3].double().numpy(), -0.5 * W[7].double().numpy()
    assert relative_error(dense(delta), truth) < 1e-5


# --- ranks are those of the adapter ---------------------------------------------------------------


def weak(name, dtype):
    """An adapter whose second direction is at 1e-8 of the first: rounding in float32."""
    B = normal(64, 2, seed=0) * torch.tensor([1, 1e-8])
    return Adapter(name, {"m": Delta(B.to(dtype), normal(2, 32, seed=1).to(dtype))})


def other(name, dtype):
    """An adapter that has that direction, and one of its own."""
    B = torch.stack([normal(64, 2, seed=0)[:, 1], normal(64, 1, seed=3)[:, 0]], dim=1)
    return Adapter(name, {"m": Delta(B.to(dtype), normal(2, 32, seed=4).to(dtype))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["chain", "mean", "principal"])
def test_the_rank_of_an_adapter_is_not_that_of_its_neighbours_precision(dtype, order, method):
    pool = [weak("x", torch.float32), other("y", dtype)][::order]
    (split,) = decompose(pool, method=method).splits
    assert split.ranks[::order] == (1, 2)
    assert split.shared_rank == 0
    assert overlap(pool).modules[0].ranks[::order] == (1, 2)
    pairs = decompose([*pool, other("z", torch.float64)], scope="pairwise").splits
    assert {s.ranks[s.group.index("x")] for s in pairs if "x" in s.group} == {1}
    (step,) = decompose(pool, scope="iterative", target="x").splits
    assert step.ranks == (1, 2)


def test_a_float64_adapter_keeps_its_weak_direction_beside_float32():
    pool = [weak("x", torch.float64), other("y", torch.float32)]
    (split,) = decompose(pool).splits
    assert (split.ranks, split.shared_rank) == ((2, 2), 1)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compression_is_optimal_for_the_gains_kept(axis, rank):
    module, (adapter, *_), (truth, *_) = pool((axis,))
    result = compress(adapter, rank=rank)
    singular = np.linalg.svd(low_rank(adapter.modules["m"]), compute_uv=False)
    error = np.linalg.norm(singular[rank:4]) / np.linalg.norm(truth)
    written = module.written(result.adapter.modules["m"], axis)
    assert apart(written, truth) == pytest.approx(error, abs=1e-12)
    assert result.error == result.errors["m"] == pytest.approx(error, abs=1e-12)
    assert result.adapter.modules["m"].rank == rank


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_is_that_of_the_whole_delta(energy):
    module, (adapter, *_), (truth, *_) = pool(("out",))
    result = compress(adapter, energy=energy)
    delta = result.adapter.modules["m"]
    assert apart(module.dense(delta), truth) ** 2 <= 1 - energy + 1e-12
    if delta.rank:
        worse = compress(adapter, rank=delta.rank - 1) if delta.rank > 1 else None
        assert worse is None or worse.error**2 > 1 - energy


def test_a_dora_of_rank_zero_keeps_its_gains():
    module, (adapter, *_), (truth, *_) = pool(("out",))
    delta = adapter.modules["m"].resolved()
    gains = Delta(
        delta.B[:, :0], delta.A[:0], gain=delta.gain.with_factors(delta.B[:, :0], delta.A[:0])
    )
    kept = compress(Adapter("g", {"m": gains}), rank=3).adapter.modules["m"]
    assert kept.rank == 0
    assert apart(module.written(kept, "out"), truth - low_rank(delta)) < 1e-12
