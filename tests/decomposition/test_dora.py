"""Decompositions of DoRAs, beside the naive dense float64 truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import devec
from devec.deltas.gains import Magnitude
from support.adapters.dense_doras import apart, low_rank, pool
from support.truth.reference import BASES, deflate

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("axes", [("out", "out"), ("out", "lora", "in"), ("lora", "in", "out")])
def test_parts_are_projections_of_the_whole_delta(axes, method, dtype):
    module, adapters, truths = pool(axes, dtype)
    parts = devec.decompose(adapters, threshold=0.5, method=method)
    Z = BASES[method]([low_rank(a.modules["m"]) for a in adapters], 0.5)
    assert parts.splits[0].shared_rank == Z.shape[1] == 2
    shares = [np.linalg.norm(Z @ Z.T @ truth) for truth in truths]
    common = sum(s * Z @ Z.T @ t for s, t in zip(shares, truths, strict=True)) / sum(shares)
    assert apart(module.dense(parts.common.modules["m"]), common) < ROUNDING[dtype]
    for adapter, truth, axis in zip(adapters, truths, axes, strict=True):
        shared, unique = (p[adapter.name].modules["m"] for p in (parts.shared, parts.unique))
        assert shared.gain is None
        assert (unique.gain is None) == (axis == "lora")
        assert apart(module.dense(shared), Z @ Z.T @ truth) < ROUNDING[dtype]
        assert apart(module.dense(unique), truth - Z @ Z.T @ truth) < ROUNDING[dtype]
        assert apart(module.dense(shared + unique), truth) < ROUNDING[dtype]
        if axis != "lora":
            written = module.written(unique, axis)
            assert apart(written, truth - Z @ Z.T @ truth) < ROUNDING[dtype]
    row = parts.splits[0]
    assert row.norms == pytest.approx([np.linalg.norm(t) for t in truths], rel=ROUNDING[dtype])
    assert row.shared_norms == pytest.approx(shares, rel=ROUNDING[dtype])


def test_the_target_loses_what_it_shares_with_each_of_the_others():
    module, adapters, truths = pool(("out", "out", "lora"))
    parts = devec.decompose(adapters, threshold=0.5, scope="iterative", target="a")
    low = [low_rank(a.modules["m"]) for a in adapters]
    removed, _ = deflate(low[0], low[1:], 0.5)
    U = np.linalg.svd(removed)[0][:, :2]
    assert apart(module.dense(parts.shared["a"].modules["m"]), U @ U.T @ truths[0]) < 1e-9
    rest = truths[0] - U @ U.T @ truths[0]
    assert apart(module.dense(parts.unique["a"].modules["m"]), rest) < 1e-9
    assert apart(module.written(parts.unique["a"].modules["m"], "out"), rest) < 1e-9
    negated = -0.5 * parts.unique["a"]
    assert apart(module.written(negated.modules["m"], "out"), -0.5 * rest) < 1e-9


def test_a_pair_has_a_common_vector():
    module, adapters, truths = pool(("out", "out", "in"))
    parts = devec.decompose(adapters, threshold=0.5, scope="pairwise")
    low = [low_rank(a.modules["m"]) for a in adapters]
    Z = BASES["chain"]([low[0], low[2]], 0.5)
    shares = [np.linalg.norm(Z @ Z.T @ truths[i]) for i in (0, 2)]
    want = sum(s * Z @ Z.T @ truths[i] for s, i in zip(shares, (0, 2), strict=True)) / sum(shares)
    assert apart(module.dense(parts.shared["a+c"].modules["m"]), want) < 1e-9


def test_where_nothing_is_shared_a_dora_stays_as_it_was_read():
    module, adapters, _ = pool(("out", "out"))
    lonely = replace(adapters[0], modules={**adapters[0].modules, "own": module.dora()[0]})
    parts = devec.decompose([lonely, adapters[1]], threshold=0.5)
    own = parts.unique["a"].modules["own"]
    assert own.B is lonely.modules["own"].B
    assert isinstance(own.gain, Magnitude)
    assert parts.shared["a"].modules["own"].rank == 0
    assert "own" in parts.outputs()["a-unique"].modules


def test_the_parts_hold_no_base_weight():
    _, adapters, _ = pool(("out", "out"))
    held = adapters[0].modules["m"].gain.base
    parts = devec.decompose(adapters, threshold=0.5)
    assert all(part.modules["m"].gain.base is held for part in parts.unique.values())


def test_outputs_are_compacted_to_their_true_ranks():
    module, adapters, truths = pool(("out", "out"))
    parts = devec.decompose(adapters, threshold=0.5)
    held = parts.outputs(compact=True)
    for name in "ab":
        whole = sum(
            module.dense(held[f"{name}-{part}"].modules["m"]) for part in ("unique", "shared")
        )
        assert apart(whole, truths["ab".index(name)]) < 1e-6
    assert held["a-shared"].modules["m"].rank == 2
