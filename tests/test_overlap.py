"""Overlaps are what the dense subspaces say."""

import numpy as np
import pytest
import torch
from cases import dense

from devec import Adapter, Delta, DevecError, DevecWarning, overlap
from devec.subspace import random_edge


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
