"""The nearest plain LoRA to a DoRA, beside the best approximation of its dense ΔW."""

import numpy as np
import pytest
import torch

import devec
from devec import DevecError
from support.adapters.dense_doras import apart, pool

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


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
