"""DoRAs compressed, turned into LoRAs, measured and compared."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import devec
from devec import Adapter, Delta, DevecError
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Magnitude
from support.adapters.cases import relative_error
from support.adapters.dense_doras import apart, dense_change, low_rank, pool
from support.truth.reference import dora_truth

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compression_is_optimal_for_the_gains_kept(axis, rank):
    module, (adapter, *_), (truth, *_) = pool((axis,))
    result = devec.compress(adapter, rank=rank)
    singular = np.linalg.svd(low_rank(adapter.modules["m"]), compute_uv=False)
    error = np.linalg.norm(singular[rank:4]) / np.linalg.norm(truth)
    written = module.written(result.adapter.modules["m"], axis)
    assert apart(written, truth) == pytest.approx(error, abs=1e-12)
    assert result.error == result.errors["m"] == pytest.approx(error, abs=1e-12)
    assert result.adapter.modules["m"].rank == rank


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_is_that_of_the_whole_delta(energy):
    module, (adapter, *_), (truth, *_) = pool(("out",))
    result = devec.compress(adapter, energy=energy)
    delta = result.adapter.modules["m"]
    assert apart(module.dense(delta), truth) ** 2 <= 1 - energy + 1e-12
    if delta.rank:
        worse = devec.compress(adapter, rank=delta.rank - 1) if delta.rank > 1 else None
        assert worse is None or worse.error**2 > 1 - energy


def test_a_dora_of_rank_zero_keeps_its_gains():
    module, (adapter, *_), (truth, *_) = pool(("out",))
    delta = replace(adapter.modules["m"].resolved())
    gains = Delta(
        delta.B[:, :0], delta.A[:0], gain=delta.gain.with_factors(delta.B[:, :0], delta.A[:0])
    )
    kept = devec.compress(Adapter("g", {"m": gains}), rank=3).adapter.modules["m"]
    assert kept.rank == 0
    assert apart(module.written(kept, "out"), truth - low_rank(delta)) < 1e-12


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("axes", [("out",), ("in",), ("out", "in"), ("out", "lora")])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_the_nearest_lora_is_nearly_the_best(axes, rank, dtype):
    module, adapters, truths = pool(axes, dtype)
    total, truth = adapters[0], truths[0]
    if len(axes) > 1:
        total, truth = total - 0.5 * adapters[1], truth - 0.5 * truths[1]
    result = devec.as_lora(total, rank)
    nearest = result.adapter.modules["m"]
    assert (nearest.gain, nearest.rank) == (None, rank)
    error = apart(module.dense(nearest), truth)
    assert result.error == pytest.approx(error, rel=1e-5)
    singular = np.linalg.svd(truth, compute_uv=False)
    best = np.linalg.norm(singular[rank:]) / np.linalg.norm(singular)
    assert best <= error + 1e-6
    assert error <= 1.01 * best


def test_plain_loras_are_left_as_they_are():
    _, (adapter,), _ = pool(("lora",))
    for rank in (2, 4):
        same = devec.as_lora(adapter, rank)
        assert same.adapter.modules["m"] is adapter.modules["m"]
        assert same.error == 0


def test_a_rank_below_one_is_refused():
    _, adapters, _ = pool(("out",))
    with pytest.raises(DevecError, match="rank must be at least 1, got 0"):
        devec.as_lora(adapters[0], 0)


def test_measures_are_those_of_the_whole_delta():
    _, adapters, truths = pool(("out", "lora", "in"))
    found = devec.overlap(adapters)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b, A, B = adapters[i], adapters[j], truths[i], truths[j]
        cosine = (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B)
        assert found.cosines[a.name, b.name] == pytest.approx(cosine, abs=1e-10)
        assert devec.cosine(a, b) == pytest.approx(cosine, abs=1e-10)
        assert devec.distance(a, b) == pytest.approx(np.linalg.norm(A - B), rel=1e-9)
        Q, R = (np.linalg.svd(low_rank(x.modules["m"]))[0][:, :4] for x in (a, b))
        squared = np.linalg.svd(Q.T @ R, compute_uv=False) ** 2
        row = next(r for r in found.modules if r.pair == (a.name, b.name))
        assert row.squared_cosines.numpy() == pytest.approx(squared, abs=1e-9)


def test_equality_is_of_effect():
    _, (a, b), _ = pool(("out", "lora"))
    assert a == 1.0 * a == (a + b) - b
    assert a != 1.001 * a
    assert a != Adapter("a", {"m": replace(a.modules["m"], gain=None)})


def test_norms_of_whole_adapters_add_in_squares():
    _, adapters, truths = pool(("out", "in"))
    both = Adapter("both", {"first": adapters[0].modules["m"], "second": adapters[1].modules["m"]})
    assert both.norm() == pytest.approx(math.hypot(*map(np.linalg.norm, truths)), rel=1e-10)


@pytest.mark.parametrize("decades", [0, 1, 2, 3])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_how_the_factors_are_written_does_not_matter(decades, axis):
    """The error is that of float32 factors, whose products are formed densely in float32."""
    g = torch.Generator().manual_seed(0)
    W, B, A = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((64, 48), (64, 6), (6, 48))
    )
    Q = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    G = Q * 10.0 ** -torch.linspace(0, decades, 6, dtype=torch.float64) @ Q.mT
    b, a = (B @ G).float(), torch.linalg.solve(G, A).float()
    W = W.float()
    dim = 1 if axis == "out" else 0
    m = ((W.double() + B @ A).norm(dim=dim) * 1.1).float()
    delta = Delta(b, a, 1.0, None, Magnitude(m, axis, HeldWeight(W, "base")))
    truth = dora_truth(*(x.double().numpy() for x in (W, b, a)), 1.0, m.double().numpy(), axis)
    V = W + b @ a
    norms = V.norm(dim=dim)
    plain = (m / norms)[:, None] * V - W if axis == "out" else V * (m / norms) - W
    error = relative_error(dense_change(delta), truth)
    assert error < max(3 * relative_error(plain, truth), 1e-6)
    doubled = relative_error(dense_change(delta + delta), 2 * truth)
    assert doubled < max(3 * relative_error(plain, truth), 1e-6)
    assert delta.norm() == pytest.approx(np.linalg.norm(truth), rel=1e-6 * 10**decades)
