"""DoRAs and LoRAs are one vector space: everything beside the naive dense float64 truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import devec
from devec import Adapter, Delta
from devec.deltas.base_weight import HeldWeight
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Magnitude
from devec.errors import IncompatibleError
from support.adapters.cases import relative_error
from support.adapters.dense_doras import IN, OUT, Module, apart, dense_change
from support.truth.reference import dora_truth

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}

# axis and number of inputs that share a magnitude
AXES = {"outputs": ("out", 1), "inputs": ("in", 1), "channels": ("in", 9)}

seeds = st.integers(0, 1000)

weights = st.floats(-3, 3, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("axis", "group"), AXES.values(), ids=AXES)
def test_magnitudes_become_gains(axis, group, dtype):
    module = Module()
    delta, truth = module.dora(axis=axis, group=group, dtype=dtype)
    assert apart(module.dense(delta), truth) < ROUNDING[dtype]
    assert delta.norm() == pytest.approx(np.linalg.norm(truth), rel=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("axis", "group"), AXES.values(), ids=AXES)
@pytest.mark.parametrize("seed", range(5))
def test_linear_combinations_are_written_as_one_dora(seed, axis, group, dtype):
    module = Module(seed)
    changes = [module.dora(4, axis, group, dtype), module.dora(3, axis, group, dtype)]
    changes.append(module.lora(2, dtype))
    coefficients = module.rng.uniform(-1.5, 1.5, 3)
    combined = sum((w * d for w, (d, _) in zip(coefficients[1:], changes[1:], strict=True)),
                   coefficients[0] * changes[0][0])  # fmt: skip
    truth = sum(w * t for w, (_, t) in zip(coefficients, changes, strict=True))
    scale = sum(np.linalg.norm(w * t) for w, (_, t) in zip(coefficients, changes, strict=True))
    assert np.linalg.norm(module.dense(combined) - truth) < ROUNDING[dtype] * scale
    assert np.linalg.norm(module.written(combined, axis, group) - truth) < ROUNDING[dtype] * scale


@pytest.mark.parametrize(("axis", "group"), AXES.values(), ids=AXES)
def test_a_lora_can_be_written_as_a_dora(axis, group):
    module = Module()
    delta, truth = module.lora()
    assert apart(module.written(delta, axis, group), truth) < 1e-12


def test_an_unchanged_dora_is_written_as_it_was_read():
    delta, _ = Module().dora(dtype=torch.bfloat16)
    assert as_magnitudes(delta, "out", delta.gain.base) is delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("axis", "group"), AXES.values(), ids=AXES)
def test_half_precision_is_only_how_factors_are_stored(dtype, axis, group):
    module = Module()
    delta, truth = module.dora(4, axis, group, dtype)
    assert apart(module.dense(delta), truth) < 1e-6
    assert apart(module.written(2 * delta, axis, group), 2 * truth) < 1e-6
    adapter = Adapter("a", {"m": delta})
    near = devec.as_lora(adapter, min(OUT, IN)).adapter.modules["m"]
    assert apart(module.dense(near), truth) < 1e-6
    compressed = devec.compress(adapter, rank=2)
    found = module.dense(compressed.adapter.modules["m"])
    assert apart(found, truth) == pytest.approx(compressed.error, rel=1e-5)


def test_factors_whose_squares_leave_half_precision():
    module = Module()
    delta, _ = module.dora(4, dtype=torch.float16)
    A = 1000 * torch.ones(4, IN, dtype=torch.float16)
    B = torch.full((OUT, 4), 1e-3, dtype=torch.float16)
    delta = replace(delta, B=B, A=A)
    m = delta.gain.values.double().numpy()
    truth = dora_truth(module.W, B.double().numpy(), A.double().numpy(), 0.5, m, "out", 1)
    assert apart(module.written(-delta, "out"), -truth) < 1e-6


@pytest.mark.parametrize("of", ["as_lora", "compress"])
def test_errors_are_relative_to_the_weights_alone(of):
    module = Module()
    delta, truth = module.dora()
    delta = replace(delta, bias=1000 * torch.ones(OUT, dtype=torch.float64))
    lower = {"as_lora": devec.as_lora, "compress": devec.compress}[of]
    result = lower(Adapter("a", {"m": delta}), rank=2)
    assert apart(module.dense(result.adapter.modules["m"]), truth) == pytest.approx(result.error)


@given(seeds, weights, weights, st.sampled_from(list(AXES)), st.sampled_from(list(AXES)))
def test_vector_space_laws(seed, v, w, left, right):
    module = Module(seed)
    a, A = module.dora(4, *AXES[left])
    b, B = module.dora(3, *AXES[right])
    c, C = module.lora()
    scale = np.linalg.norm(A) + np.linalg.norm(B) + np.linalg.norm(C)
    assert apart(module.dense(v * a - w * b + c), v * A - w * B + C) < 1e-9
    assert (((a + b) + c) - (a + (b + c))).norm() < 1e-7 * scale
    assert (v * (a + b) - (v * a + v * b)).norm() < 1e-7 * scale * abs(v)
    assert (a - a).norm() < 1e-7 * scale


@pytest.mark.parametrize("left", [*AXES, "lora"])
@pytest.mark.parametrize("right", [*AXES, "lora"])
def test_inner_products_are_the_dense_ones(left, right):
    module = Module()
    (a, A), (b, B) = (
        module.lora() if kind == "lora" else module.dora(3, *AXES[kind]) for kind in (left, right)
    )
    scale = np.linalg.norm(A) * np.linalg.norm(B)
    assert a.inner(b) == pytest.approx((A * B).sum(), abs=1e-12 * scale)
    assert (a - b).norm() == pytest.approx(np.linalg.norm(A - B), rel=1e-9)


@pytest.mark.parametrize("kind", AXES)
def test_the_effect_depends_on_the_product_alone(kind):
    module = Module()
    delta, truth = module.dora(4, *AXES[kind])
    G = torch.from_numpy(module.rng.standard_normal((4, 4)))
    turned = replace(delta, B=delta.B @ G, A=torch.linalg.inv(G) @ delta.A)
    assert apart(module.dense(turned), truth) < 1e-10


@pytest.mark.parametrize("scale", [0.0, -1.0], ids=["zero", "negative"])
def test_zero_and_negative_magnitudes_are_valid(scale):
    module = Module()
    delta, _ = module.dora()
    m = delta.gain.values.clone()
    m[3] = scale * m[3]
    delta = replace(delta, gain=replace(delta.gain, values=m))
    truth = dora_truth(module.W, delta.B.numpy(), delta.A.numpy(), 0.5, m.numpy(), "out")
    assert apart(module.dense(delta), truth) < 1e-12
    # a row that is switched off altogether has no factor left to divide
    assert apart(module.written(1.0 * delta, "out"), truth) < 1e-12


def test_rows_that_cancel_most_of_the_base_keep_their_digits():
    module = Module()
    delta, _ = module.dora(dtype=torch.float32)
    delta = replace(delta, scaling=1.0)
    B, A = delta.B.double().numpy(), delta.A.double().numpy()
    module.W[:5] = -(B @ A)[:5] + 1e-3 * module.rng.standard_normal((5, IN))
    module.W[:] = module.W.astype(np.float32)
    m = delta.gain.values.double().numpy()
    truth = dora_truth(module.W, B, A, 1.0, m, "out")
    rows = np.linalg.norm(module.dense(delta) - truth, axis=1)
    # W0 + B·A itself has lost three digits there in float32, and no more than those
    assert (rows[:5] < 1e-3 * np.abs(m[:5])).all()
    assert (rows[5:] < 1e-6 * np.linalg.norm(truth, axis=1)[5:]).all()


def test_a_row_that_vanishes_is_refused():
    module = Module()
    delta, _ = module.dora()
    module.W[7] = -(0.5 * delta.B @ delta.A)[7].numpy()
    with pytest.raises(IncompatibleError, match=r"row 7 of W0 \+ s·B·A is zero"):
        delta.resolved()


def test_doras_of_different_base_models_do_not_add():
    module = Module()
    (a, _), (b, _) = module.dora(), module.dora()
    other = b.on(HeldWeight(module.base.tensor, "another model"))
    with pytest.raises(IncompatibleError, match=r"memory \d+ and another model"):
        a + other
    with pytest.raises(IncompatibleError, match=r"memory \d+ and another model"):
        a.inner(other)
    with pytest.raises(IncompatibleError, match="module 'm': two DoRAs were read with different"):
        devec.decompose([Adapter("a", {"m": a}), Adapter("b", {"m": other})])


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_precision_is_that_of_the_wider_factor(dtypes, axis):
    g = torch.Generator().manual_seed(1)
    W, B, A = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((64, 48), (64, 4), (4, 48))
    )
    W, B, A = W.float(), B.float().to(dtypes[0]), A.float().to(dtypes[1])
    V = W.double() + B.double() @ A.double()
    m = V.norm(dim=1 if axis == "out" else 0) * 1.1
    delta = Delta(B, A, 1.0, None, Magnitude(m, axis, HeldWeight(W, "base")))
    truth = dora_truth(*(x.double().numpy() for x in (W, B, A)), 1.0, m.numpy(), axis)
    assert delta.dtype == torch.float64
    assert relative_error(dense_change(delta), truth) < 1e-13


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
