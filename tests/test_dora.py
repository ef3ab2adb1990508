"""DoRAs and LoRAs are one vector space: everything beside the naive dense float64 truth."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import relative_error
from hypothesis import given
from hypothesis import strategies as st
from reference import BASES, deflate, dora_truth

import devec
from devec import Adapter, Delta, DevecError
from devec.base_model.model import base_model
from devec.deltas.base_weight import ConcatenatedWeight, InMemoryWeight, WeightRows
from devec.deltas.dora import _largest_coefficient, as_magnitudes, require_representable
from devec.deltas.gains import Gain, Magnitude
from devec.errors import IncompatibleError, UnsupportedError

OUT, IN = 40, 36
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}
# axis and number of inputs that share a magnitude
AXES = {"outputs": ("out", 1), "inputs": ("in", 1), "channels": ("in", 9)}

seeds = st.integers(0, 1000)
weights = st.floats(-3, 3, allow_nan=False).filter(lambda w: abs(w) > 1e-3)


class Module:
    """A module with random weights, and random changes of it with their truth."""

    def __init__(self, seed=0, out=OUT, columns=IN):
        self.rng = np.random.default_rng(seed)
        self.W = self.rng.standard_normal((out, columns))
        self.base = InMemoryWeight(torch.from_numpy(self.W))
        self.common = self.rng.standard_normal((out, 2))

    def factors(self, rank):
        """Factors whose first two columns are nearly those of every other change."""
        B = 0.4 * self.rng.standard_normal((len(self.W), rank))
        B[:, :2] = 0.1 * B[:, :2] + self.common[:, : min(rank, 2)]
        return B, 0.3 * self.rng.standard_normal((rank, self.W.shape[1]))

    def lora(self, rank=3, dtype=torch.float64):
        B, A = self.factors(rank)
        return Delta(torch.from_numpy(B).to(dtype), torch.from_numpy(A).to(dtype), 0.7), 0.7 * B @ A

    def dora(self, rank=4, axis="out", group=1, dtype=torch.float64):
        B, A = self.factors(rank)
        squares = (self.W**2).sum(1 if axis == "out" else 0).reshape(-1, group).sum(1)
        m = np.sqrt(squares) * (1 + 0.2 * self.rng.standard_normal(len(squares)))
        stored = [torch.from_numpy(t).to(dtype) for t in (B, A, m)]
        # what is stored is the truth, whatever its precision
        B, A, m = (t.double().numpy() for t in stored)
        magnitude = Magnitude(stored[2], axis, self.base)
        truth = dora_truth(self.W, B, A, 0.5, m, axis, group)
        return Delta(stored[0], stored[1], 0.5, gain=magnitude), truth

    def dense(self, delta):
        """ΔW = s·B·A + diag(g)·W0 + W0·diag(h), as the class says it."""
        delta = delta.resolved()
        change = delta.scaling * (delta.B.double() @ delta.A.double()).numpy()
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        if "out" in axes:
            change = change + axes["out"].values.double().numpy()[:, None] * self.W
        if "in" in axes:
            change = change + self.W * axes["in"].values.double().numpy()
        return change

    def written(self, delta, axis, group=1):
        """ΔW that a host makes of what is written: one DoRA, by its definition."""
        stored = as_magnitudes(delta, axis, self.base, group)
        B, A, m = (t.double().numpy() for t in (stored.B, stored.A, stored.gain.values))
        return dora_truth(self.W, B, A, stored.scaling, m, axis, group)


def apart(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def low_rank(delta):
    delta = delta.resolved()
    return delta.scaling * (delta.B.double() @ delta.A.double()).numpy()


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
    other = b.on(InMemoryWeight(module.base.tensor, "another model"))
    with pytest.raises(IncompatibleError, match=r"memory \d+ and another model"):
        a + other
    with pytest.raises(IncompatibleError, match=r"memory \d+ and another model"):
        a.inner(other)
    with pytest.raises(IncompatibleError, match="module 'm': two DoRAs were read with different"):
        devec.decompose([Adapter("a", {"m": a}), Adapter("b", {"m": other})])


# What no single DoRA can be


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


def test_magnitudes_far_from_the_norms_are_told_of():
    module = Module()
    delta, _ = module.dora()
    other = delta.on(InMemoryWeight(100 * module.base.tensor))
    with pytest.warns(devec.DevecWarning, match="probably not the base model"):
        other.norm()


# Base weights in pieces


def test_weights_are_cut_and_put_together():
    module = Module()
    parts = [WeightRows(module.base, 0, 15), WeightRows(module.base, 15, OUT)]
    whole = ConcatenatedWeight(parts)
    assert torch.equal(whole.read(torch.float64, torch.device("cpu")), module.base.tensor)
    assert whole.source == parts[0].source == module.base.source


# The operations


def pool(axes=("out", "lora", "in"), dtype=torch.float64, seed=0):
    """Adapters of one module that share two directions nearly, and their truths."""
    module, adapters, truths = Module(seed), [], []
    for name, axis in zip("abcde", axes, strict=False):
        delta, truth = (
            module.lora(4, dtype) if axis == "lora" else module.dora(4, axis, dtype=dtype)
        )
        adapters.append(Adapter(name, {"m": delta}))
        truths.append(truth)
    return module, adapters, truths


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
    delta = Delta(b, a, 1.0, None, Magnitude(m, axis, InMemoryWeight(W, "base")))
    truth = dora_truth(*(x.double().numpy() for x in (W, b, a)), 1.0, m.double().numpy(), axis)
    V = W + b @ a
    norms = V.norm(dim=dim)
    plain = (m / norms)[:, None] * V - W if axis == "out" else V * (m / norms) - W
    error = relative_error(dense_change(delta), truth)
    assert error < max(3 * relative_error(plain, truth), 1e-6)
    doubled = relative_error(dense_change(delta + delta), 2 * truth)
    assert doubled < max(3 * relative_error(plain, truth), 1e-6)
    assert delta.norm() == pytest.approx(np.linalg.norm(truth), rel=1e-6 * 10**decades)


def dense_change(delta):
    """ΔW of a delta with gains, in float64."""
    delta = delta.resolved()
    W = delta.gain.base.read(torch.float64, torch.device("cpu"))
    change = delta.scaling * delta.B.double() @ delta.A.double()
    axes = delta.gain.axes
    if "out" in axes:
        change = change + axes["out"].values.double()[:, None] * W
    if "in" in axes:
        change = change + W * axes["in"].values.double()
    return change.numpy()


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
    delta = Delta(B, A, 1.0, None, Magnitude(m, axis, InMemoryWeight(W, "base")))
    truth = dora_truth(*(x.double().numpy() for x in (W, B, A)), 1.0, m.numpy(), axis)
    assert delta.dtype == torch.float64
    assert relative_error(dense_change(delta), truth) < 1e-13
