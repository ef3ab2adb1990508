"""Adapters are vectors."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devec import Adapter, Delta, DevecError, combine, cosine, distance, inner
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Magnitude
from support.adapters.cases import dense, make_pool, relative_error, save_kohya
from support.adapters.dense_doras import pool

weights = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-2)
seeds = st.integers(0, 500)


def adapter(seed, name="a", modules=("q", "v"), rank=3, dtype=torch.float32):
    deltas = {}
    for index, module in enumerate(modules):
        g = torch.Generator().manual_seed(10 * seed + index)
        B, A = torch.randn(9, rank, generator=g), torch.randn(rank, 7, generator=g)
        deltas[module] = Delta(B.to(dtype), A.to(dtype), 0.5 + index)
    return Adapter(name, deltas)


@given(seeds, seeds, weights, weights)
def test_operators_are_the_dense_ones(i, j, v, w):
    a, b = adapter(i), adapter(j, "b")
    result = v * a - b * w + a / v
    for module in ("q", "v"):
        x, y = dense(a.modules[module]), dense(b.modules[module])
        want = v * x - w * y + x / v
        assert relative_error(dense(result.modules[module]), want) < 1e-5


@given(seeds, seeds, seeds, weights)
def test_vector_space_laws_hold_as_equality_of_effect(i, j, k, w):
    a, b, c = adapter(i), adapter(j, "b", rank=2), adapter(k, "c", rank=1)
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert w * (a + b) == w * a + w * b
    assert -1 * -a == a
    assert (a / w) * w == a
    assert (a - a).norm() < 1e-5 * a.norm()


def test_equality_is_of_effect_not_of_factors():
    a = adapter(1)
    G = torch.randn(3, 3) + 4 * torch.eye(3)
    same = a.map(lambda _, d: Delta(d.B @ G, torch.linalg.solve(G, d.A), d.scaling))
    assert same == a
    assert distance(same, a) < 1e-5 * a.norm()
    assert a != 1.001 * a
    assert a != adapter(2)
    assert a != "a"
    assert a != dataclasses.replace(a, carried={"head": torch.ones(1)})


def test_nothing_equals_nothing():
    a, b = adapter(1), adapter(2)
    assert a - a == 0 * a
    assert a - a == b - b
    assert a != 0 * a


def test_adapters_of_different_bases_are_not_equal():
    a = adapter(1)
    assert a != a.map(lambda _, d: Delta(d.B[:-1], d.A, d.scaling))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_the_tolerance_of_equality_is_that_of_biases_too(size, scaling):
    g = torch.Generator().manual_seed(3)
    B, A = size * torch.randn(64, 4, generator=g), torch.randn(4, 32, generator=g)
    a = Adapter("a", {"x": Delta(B, A, scaling, torch.randn(64, generator=g))})
    for same in ((a / 3) * 3, 0.1 * a + 0.9 * a, a + a - a, -1 * -a):
        assert same == a
    assert a != Adapter("a", {"x": Delta(B, A, scaling, torch.randn(64, generator=g))})
    assert a != Adapter("a", {"x": Delta(B, A, scaling)})


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_a_large_bias_does_not_hide_the_weights(size):
    g = torch.Generator().manual_seed(4)
    B, A = size * torch.randn(64, 4, generator=g), torch.randn(4, 32, generator=g)
    bias = 1e3 * torch.randn(64, generator=g)
    a = Adapter("a", {"x": Delta(B, A, 1.0, bias)})
    assert a != Adapter("a", {"x": Delta(-B, A, 1.0, bias)})
    assert (a / 3) * 3 == a


def dora(base, name="d"):
    g = torch.Generator().manual_seed(5)
    B, A = torch.randn(8, 2, generator=g), torch.randn(2, 6, generator=g)
    m = torch.rand(8, generator=g) + 2
    return Adapter(name, {"m": Delta(B, A, 1.0, None, Magnitude(m, "out", base))})


def test_doras_of_different_base_models_are_not_equal():
    one, two = (HeldWeight(torch.randn(8, 6), source) for source in ("one", "two"))
    a, b = dora(one), dora(two)
    assert a == dora(one)
    assert a != b
    assert b not in [a]
    assert b in [a, dora(two)]
    assert a + a != b + b
    assert dataclasses.replace(b, modules={"other": b.modules["m"]}) != a
    lora = Adapter("l", {"m": Delta(a.modules["m"].B, a.modules["m"].A)})
    assert a != lora


def test_adapters_of_kinds_that_do_not_align_are_not_equal(tmp_path):
    """Experts have a form in PEFT alone, so that no file of kohya's is the same."""
    (experts,) = make_pool(tmp_path / "peft", "experts", k=1)
    kohya = save_kohya(tmp_path / "kohya.safetensors", 0)
    one, two = (Adapter.from_pretrained(path) for path in (experts, kohya))
    assert one != two
    assert two not in [one]


def test_adapters_own_their_modules():
    modules = dict(adapter(1).modules)
    a = Adapter("a", modules)
    modules["q"] = adapter(2).modules["q"]
    del modules["v"]
    assert a == adapter(1)


def test_adapters_cannot_be_hashed_since_equality_is_up_to_rounding():
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter(1))


@given(seeds, seeds)
def test_distance_norm_and_cosine_agree(i, j):
    a, b = adapter(i), adapter(j, "b")
    squared = a.norm() ** 2 - 2 * inner(a, b) + b.norm() ** 2
    assert distance(a, b) ** 2 == pytest.approx(squared, rel=1e-5, abs=1e-4)
    assert distance(a, b) == pytest.approx((a - b).norm(), rel=1e-5, abs=1e-5)
    assert -1.0001 <= cosine(a, b) <= 1.0001


def test_modules_that_one_adapter_lacks_count_as_zero():
    a, b = adapter(1, modules=("q",)), adapter(2, "b", modules=("v",))
    assert inner(a, b) == 0
    assert set((a + b).modules) == {"q", "v"}
    assert distance(a, b) == pytest.approx((a.norm() ** 2 + b.norm() ** 2) ** 0.5, rel=1e-6)


def test_distance_of_nearly_equal_adapters_is_accurate():
    a = adapter(1, dtype=torch.float64)
    b = (1 + 1e-9) * a
    assert distance(a, b) == pytest.approx(1e-9 * a.norm(), rel=1e-5)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight):
    with pytest.raises(DevecError, match="weight must be a finite number"):
        weight * adapter(1)


def test_combine_wants_a_weight_for_each():
    with pytest.raises(DevecError, match="adapters: 2, weights: 1"):
        combine([adapter(1), adapter(2, "b")], [1])
    with pytest.raises(DevecError, match="adapters: 0"):
        combine([], [])


def test_an_adapter_made_in_memory_says_why_it_cannot_be_saved(tmp_path):
    with pytest.raises(DevecError, match="'a' was made in memory and has no file layout"):
        adapter(1).save_pretrained(tmp_path / "a")


def test_adapters_move_between_devices():
    a = adapter(1)
    assert a.to("cpu") == a
    with pytest.raises(DevecError, match="'meta' cannot be used"):
        a.to("meta")


def test_adapters_say_in_a_line_what_they_are():
    assert repr(adapter(1)) == "Adapter('a', 2 modules, rank 3)"
    assert repr(adapter(1).modules["q"]) == "Delta(9×7, rank 3)"


@pytest.mark.parametrize("other", [1, None, "b"])
def test_adapters_add_to_adapters_only(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        adapter(1) + other
    with pytest.raises(TypeError, match="unsupported operand"):
        adapter(1) - other


def test_equality_of_doras_is_of_effect():
    _, (a, b), _ = pool(("out", "lora"))
    assert a == 1.0 * a == (a + b) - b
    assert a != 1.001 * a
    assert a != Adapter("a", {"m": dataclasses.replace(a.modules["m"], gain=None)})


def test_norms_of_whole_doras_add_in_squares():
    _, adapters, truths = pool(("out", "in"))
    both = Adapter("both", {"first": adapters[0].modules["m"], "second": adapters[1].modules["m"]})
    assert both.norm() == pytest.approx(math.hypot(*map(np.linalg.norm, truths)), rel=1e-10)
