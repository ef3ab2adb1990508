"""What no single DoRA can be, and where digits would be lost."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import devec
from devec import Adapter, Delta
from devec.base_model.model import base_model
from devec.deltas.base_weight import ConcatenatedWeight, HeldWeight, WeightRows
from devec.deltas.dora import _largest_coefficient, as_magnitudes, require_representable
from devec.deltas.gains import Gain
from devec.errors import IncompatibleError, UnsupportedError
from support.adapters.dense_doras import IN, OUT, Module, apart
from support.truth.reference import dora_truth

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


def test_a_sum_over_both_axes_is_computed_but_not_written():
    module = Module()
    (a, A), (b, B) = module.dora(4, "out"), module.dora(4, "in")
    total = a - 0.5 * b
    assert apart(module.dense(total), A - 0.5 * B) < 1e-12
    with pytest.raises(UnsupportedError, match="--as-lora"):
        as_magnitudes(total, "out", module.base)
    with pytest.raises(UnsupportedError, match=r"module 'm': .* --as-lora"):
        require_representable({"m": total})


def vanishing(coefficient):
    """A DoRA whose gain is -0.4 in one row and -0.8 in another, times a coefficient."""
    module = Module()
    delta, _ = module.dora()
    delta = delta.resolved()
    values = delta.gain.axes["out"].values.clone()
    values[:3] = torch.tensor([-0.4, -0.8, 0.5])
    gain = Gain(module.base, {"out": replace(delta.gain.axes["out"], values=values)})
    return module, coefficient * replace(delta, gain=gain)


@pytest.mark.parametrize("coefficient", [1.25, 2.5, 1.2505])
def test_coefficients_at_which_a_row_vanishes_are_refused(coefficient):
    module, delta = vanishing(coefficient)
    message = r"module 'm': .* largest coefficient that works is ([\d.]+) times"
    with pytest.raises(IncompatibleError, match=message) as refused:
        require_representable({"other": module.dora()[0], "m": delta})
    share = float(re.search(message, str(refused.value))[1])
    assert 0.998 < share < 1
    works = share * delta
    require_representable({"m": works})
    assert apart(module.written(works, "out"), module.dense(works)) < 1e-10
    with pytest.raises(IncompatibleError, match="largest coefficient"):
        require_representable({"m": (share + 0.0002) * delta})


@pytest.mark.parametrize("coefficient", [1.3, 2.0, 4.0, -1.0])
def test_rows_may_be_turned_around(coefficient):
    module, delta = vanishing(coefficient)
    require_representable({"m": delta})
    assert apart(module.written(delta, "out"), module.dense(delta)) < 1e-12


def test_gains_that_cancel_leave_no_trace():
    module = Module()
    (a, A), (b, _) = module.dora(4, "out"), module.dora(4, "in")
    for same in (a + 0.0 * b, (a + b) - b):
        assert list(same.gain.axes) == ["out"]
        assert apart(module.written(same, "out"), A) < 1e-10
    assert (0.0 * a).gain is None
    assert (a - a).gain is None


@pytest.mark.parametrize("rows", [[3], [0, 3, 7]])
def test_rows_at_which_the_whole_weight_is_zero_are_written(rows):
    module = Module()
    module.W[rows] = 0  # pruned or padded
    delta, truth = module.lora()
    B = delta.B.clone()
    B[rows] = 0
    truth = truth.copy()
    truth[rows] = 0
    written = module.written(replace(delta, B=B), "out")
    assert np.isfinite(written).all()
    assert apart(written, truth) < 1e-12


def test_a_row_without_any_direction_is_refused():
    module = Module()
    module.W[3] = 0
    nothing = Delta(torch.zeros(OUT, 1), torch.zeros(1, IN))
    with pytest.raises(IncompatibleError, match="row 3 of W0 is zero and nothing is added"):
        as_magnitudes(nothing, "out", module.base)


def switched_off(axis="out"):
    """A DoRA one of whose magnitudes is zero, and its truth."""
    module = Module()
    delta, _ = module.dora(axis=axis)
    m = delta.gain.values.clone()
    m[3] = 0
    delta = replace(delta, gain=replace(delta.gain, values=m))
    B, A = delta.B.numpy(), delta.A.numpy()
    return module, delta, dora_truth(module.W, B, A, 0.5, m.numpy(), axis)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rank", [2, 4])
def test_a_dora_with_a_zero_magnitude_can_be_compressed(rank, axis):
    module, delta, truth = switched_off(axis)
    result = devec.compress(Adapter("a", {"m": delta}), rank=rank)
    require_representable(result.adapter.modules)
    written = module.written(result.adapter.modules["m"], axis)
    assert apart(written, truth) == pytest.approx(result.error, abs=1e-9)


def test_the_largest_coefficient_holds_for_all_rows():
    rng = np.random.default_rng(0)
    for _ in range(300):
        gains = torch.from_numpy(-np.sort(rng.uniform(0.9, 1.4, 200)))
        share = _largest_coefficient(gains)
        assert 0 < share <= 1
        assert float((1 + share * gains).abs().min()) >= 1e-3


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_distances_are_accurate_where_doras_nearly_agree(dtype):
    module = Module()
    delta, truth = module.dora(dtype=dtype)
    near = devec.as_lora(Adapter("a", {"m": delta}), min(OUT, IN)).adapter
    got = devec.distance(Adapter("a", {"m": delta}), near) / np.linalg.norm(truth)
    assert got < 5 * ROUNDING[dtype]
    assert Adapter("a", {"m": delta}) == near


def test_equal_tensors_need_no_base_weight():
    def without_base(delta):
        return Adapter("a", {"m": delta.on(base_model(None).weight("m", (OUT, IN)))})

    module = Module()
    (a, _), (b, _) = module.dora(), module.dora()
    copied = replace(a, B=a.B.clone(), gain=replace(a.gain, values=a.gain.values.clone()))
    assert without_base(a) == without_base(copied)
    with pytest.raises(IncompatibleError, match="base=MODEL"):
        _ = without_base(a) == without_base(b)


def test_magnitudes_far_from_the_norms_are_warned_of():
    module = Module()
    delta, _ = module.dora()
    other = delta.on(HeldWeight(100 * module.base.tensor))
    with pytest.warns(devec.DevecWarning, match="probably not the base model"):
        other.norm()


def test_weights_are_cut_and_put_together():
    module = Module()
    parts = [WeightRows(module.base, 0, 15), WeightRows(module.base, 15, OUT)]
    whole = ConcatenatedWeight(parts)
    assert torch.equal(whole.read(torch.float64, torch.device("cpu")), module.base.tensor)
    assert whole.source == parts[0].source == module.base.source
