"""Overlaps are what the dense subspaces say."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from devec import Adapter, Delta, DevecError, DevecWarning, cosine, decompose, distance, overlap
from devec.linalg.chance import random_edge
from support.adapters.cases import dense
from support.adapters.dense_doras import low_rank, pool


def adapter(name, seed, rank=3, module="q"):
    g = torch.Generator().manual_seed(seed)
    delta = Delta(torch.randn(20, rank, generator=g), torch.randn(rank, 9, generator=g), 0.5)
    return Adapter(name, {module: delta})


def test_squared_cosines_and_cosine_are_those_of_the_dense_deltas():
    a, b = adapter("a", 1), adapter("b", 2, rank=2)
    (row,) = overlap([a, b]).modules
    X, Y = dense(a.modules["q"]), dense(b.modules["q"])
    U, V = np.linalg.svd(X)[0][:, :3], np.linalg.svd(Y)[0][:, :2]
    want = np.linalg.svd(U.T @ V)[1] ** 2
    np.testing.assert_allclose(row.squared_cosines, want, rtol=1e-6)
    cosine = (X * Y).sum() / np.linalg.norm(X) / np.linalg.norm(Y)
    assert row.cosine == pytest.approx(cosine, rel=1e-6)
    assert row.edge == random_edge(20, 3, 2)
    assert (row.pair, row.ranks) == (("a", "b"), (3, 2))


def test_every_pair_has_its_rows():
    found = overlap([adapter(n, i) for i, n in enumerate("abc")])
    assert [row.pair for row in found.modules] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert set(found.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}


def test_pools_that_cannot_be_compared():
    a = adapter("a", 1)
    with pytest.raises(DevecError, match="at least two adapters"):
        overlap([a])
    with pytest.raises(DevecError, match="given more than once"):
        overlap([a, a])
    with pytest.warns(DevecWarning, match="no module in common"):
        assert not overlap([a, adapter("b", 2, module="k")]).modules


@pytest.mark.parametrize("order", [1, -1])
def test_an_adapter_of_scaling_zero_overlaps_with_nothing(order):
    """alpha may be 0, as it is in the file: the adapter changes nothing, whatever its factors."""
    one = adapter("one", 1)
    zero = one.map(lambda _, d: dataclasses.replace(d, scaling=0.0), name="zero")
    pool = [zero, one][::order]
    (row,) = overlap(pool).modules
    assert row.ranks == (0, 3)[::order]
    assert (row.largest, row.edge, row.inner) == (0.0, 0.0, 0.0)
    assert math.isnan(row.cosine)
    (split,) = decompose(pool).splits
    assert (split.ranks, split.largest) == (row.ranks, 0.0)


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-20, 3e15])
def test_cosines_stay_within_their_range(scale):
    """Rounding of norms would take the cosine of parallel adapters beyond 1."""
    for seed in range(60):
        a = adapter("a", seed, rank=4)
        b = dataclasses.replace(scale * a, name="b")
        (row,) = overlap([a, b]).modules
        for value in (cosine(a, b), row.cosine, overlap([a, b]).cosines["a", "b"]):
            assert math.acos(value) == pytest.approx(0 if scale > 0 else math.pi, abs=1e-4)


def test_the_cosine_of_nothing_is_nan():
    a = adapter("a", 1)
    assert math.isnan(cosine(a, 0 * a))
    assert math.isnan(cosine(a, a.map(lambda _, d: dataclasses.replace(d, B=math.nan * d.B))))


def test_measures_of_doras_are_those_of_the_whole_delta():
    _, adapters, truths = pool(("out", "lora", "in"))
    found = overlap(adapters)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b, A, B = adapters[i], adapters[j], truths[i], truths[j]
        want = (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B)
        assert found.cosines[a.name, b.name] == pytest.approx(want, abs=1e-10)
        assert cosine(a, b) == pytest.approx(want, abs=1e-10)
        assert distance(a, b) == pytest.approx(np.linalg.norm(A - B), rel=1e-9)
        Q, R = (np.linalg.svd(low_rank(x.modules["m"]))[0][:, :4] for x in (a, b))
        squared = np.linalg.svd(Q.T @ R, compute_uv=False) ** 2
        row = next(r for r in found.modules if r.pair == (a.name, b.name))
        assert row.squared_cosines.numpy() == pytest.approx(squared, abs=1e-9)
