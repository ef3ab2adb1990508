"""Norms near the ends of float32's range, parts that are bias alone, and numbers that are none."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devec import Adapter, Delta, DevecError, as_lora, compress, decompose, overlap, save_adapters
from devec.decomposition.findings import Norms
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Magnitude
from devec.linalg.batched import column_bases
from devec.streaming.decompose_to import decompose_to
from support.folding import folded

SCALES = [1e-30, 1e-24, 1e-22, 1e-21, 1e-20, 1e-12, 1.0, 1e12, 1e18, 1e20, 1e24, 1e30]
OUT, IN = 64, 48


def normal(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def double(tensor):
    return tensor.double().numpy()


def dense(delta):
    return delta.scaling * double(delta.B) @ double(delta.A)


def planted(scale_B=1.0, scale_A=1.0, scaling=1.0, biases=False, sizes=(1.0, 1.0)):
    """Two adapters that share two directions exactly, and two modules."""
    pool = []
    for index, (name, size) in enumerate(zip("ab", sizes, strict=True)):
        modules = {}
        for m in range(2):
            B = torch.cat([normal(OUT, 2, seed=m), normal(OUT, 1, seed=10 + 2 * m + index)], dim=1)
            A = normal(3, IN, seed=20 + 2 * m + index)
            bias = normal(OUT, seed=30 + 2 * m + index) if biases else None
            modules[f"m{m}"] = Delta(size * scale_B * B, scale_A * A, scaling, bias)
        pool.append(Adapter(name, modules))
    return pool


def require_common(parts, pool):
    """Eq. 14 for each module, in float64 and by the basis found, whose span is known."""
    for split in parts.splits:
        truth = np.linalg.qr(double(normal(OUT, 2, seed=int(split.module[1]))))[0]
        Z = double(split.basis)
        assert np.abs(Z @ Z.T - truth @ truth.T).max() < 1e-5
        deltas = [a.modules[split.module] for a in pool]
        shared = [Z @ (Z.T @ double(d.B) @ double(d.A)) * d.scaling for d in deltas]
        norms = [np.linalg.norm(S) for S in shared]
        want = sum(n / sum(norms) * S for n, S in zip(norms, shared, strict=True))
        common = parts.common.modules[split.module]
        assert torch.isfinite(common.A).all()
        assert np.linalg.norm(dense(common) - want) < 1e-5 * np.linalg.norm(want)
        assert split.shared_norms == pytest.approx(norms, rel=1e-5)
        if deltas[0].bias is not None:
            along = [Z @ (Z.T @ double(d.bias)) * d.scaling for d in deltas]
            want = sum(n / sum(norms) * b for n, b in zip(norms, along, strict=True))
            found = common.scaling * double(common.bias)
            assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@folded("where", ["B", "A", "both", "scaling", "first adapter", "second adapter"])
@folded("method", ["chain", "mean"])
def test_common_is_right_and_kept_at_any_norm(scale, where, method):
    pool = {
        "B": lambda: planted(scale_B=scale),
        "A": lambda: planted(scale_A=scale, biases=True),
        "both": lambda: planted(scale_B=scale, scale_A=scale),
        "scaling": lambda: planted(scaling=scale, biases=True),
        "first adapter": lambda: planted(sizes=(scale, 1.0), biases=True),
        "second adapter": lambda: planted(sizes=(1.0, scale)),
    }[where]()
    parts = decompose(pool, method=method)
    require_common(parts, pool)
    assert set(parts.outputs()) == {"a-unique", "a-shared", "b-unique", "b-shared", "common"}
    assert set(parts.outputs(compact=True)) == set(parts.outputs())


@folded("scale", [1e-12, 1.0, 1e12])
def test_common_of_doras_is_right_at_any_norm(scale):
    pool, truth = [], []
    W = scale * normal(OUT, IN, seed=9)
    for name, index in (("a", 0), ("b", 1)):
        B = torch.cat([normal(OUT, 2, seed=0), normal(OUT, 1, seed=10 + index)], dim=1)
        A = scale * normal(3, IN, seed=20 + index) / 8
        V = double(W) + double(B) @ double(A)
        norms = np.linalg.norm(V, axis=1)
        gain = Magnitude(torch.tensor(norms, dtype=torch.float32), "out", HeldWeight(W, "base"))
        pool.append(Adapter(name, {"m0": Delta(B, A, 1.0, None, gain)}))
        m = double(gain.values)
        truth.append((m / norms)[:, None] * V - double(W))
    parts = decompose(pool)
    Z = double(parts.splits[0].basis)
    shared = [Z @ (Z.T @ T) for T in truth]
    norms = [np.linalg.norm(S) for S in shared]
    want = sum(n / sum(norms) * S for n, S in zip(norms, shared, strict=True))
    common = parts.common.modules["m0"]
    assert np.linalg.norm(dense(common) - want) < 1e-5 * np.linalg.norm(want)
    assert "common" in parts.outputs()


@folded("scale", SCALES)
def test_pairs_and_targets_are_right_at_any_norm(scale):
    pool = [*planted(scale_B=scale), Adapter("c", planted(scale_A=scale)[0].modules)]
    pairs = decompose(pool, scope="pairwise").outputs()
    assert set(pairs) == {"a+b-shared", "a+c-shared", "b+c-shared"}
    target = decompose(pool, scope="iterative", target="a", threshold=1.0)
    for module, delta in pool[0].modules.items():
        shared, unique = (dense(p["a"].modules[module]) for p in (target.shared, target.unique))
        whole = dense(delta)
        assert np.linalg.norm(shared + unique - whole) < 1e-5 * np.linalg.norm(whole)
        assert np.linalg.norm(unique) < 1e-5 * np.linalg.norm(whole)


@pytest.mark.parametrize("side", ["B", "A"])
@folded("scale", SCALES)
def test_bases_of_extreme_factors_are_right_or_left_to_the_exact_way(scale, side):
    """Squares of float32 vanish below 1e-23 and overflow above 1e19."""
    B, A = normal(3, OUT, 4, seed=1), normal(3, 4, IN, seed=2)
    want = torch.linalg.matrix_norm(B.double() @ A.double()) * float(torch.tensor(scale))
    B, A = (scale * B, A) if side == "B" else (B, scale * A)
    found = column_bases(B, A)
    for index in found.sound.nonzero()[:, 0].tolist():
        U = double(found.U[index])
        assert np.abs(U.T @ U - np.eye(4)).max() < 1e-6
        assert float(found.norms[index]) == pytest.approx(float(want[index]), rel=1e-5)


@folded("scale", SCALES)
def test_equality_compression_and_norms_hold_at_any_norm(scale):
    (a, b) = planted(scale_B=scale)
    assert (a / 3) * 3 == a
    assert a != b
    assert a != 1.001 * a
    truth = math.hypot(*(np.linalg.norm(dense(d)) for d in a.modules.values()))
    assert a.norm() == pytest.approx(truth, rel=1e-6)
    result = compress(a, rank=2)
    for module, delta in result.adapter.modules.items():
        U, S, Vh = np.linalg.svd(dense(a.modules[module]))
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        assert np.linalg.norm(dense(delta) - best) < 1e-5 * S[0]
        error = np.linalg.norm(dense(delta) - dense(a.modules[module])) / np.linalg.norm(S)
        assert result.errors[module] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-12, 1e18])
@pytest.mark.parametrize("last", [0, 2])
def test_an_adapter_that_shares_nothing_does_not_change_the_common_vector(scale, last):
    """Two of three share all they have; by a low threshold that is shared by the pool."""
    U = torch.linalg.qr(normal(OUT, 6, seed=1)).Q
    pool = [
        Adapter(name, {"m": Delta(scale * U[:, columns], normal(3, IN, seed=index))})
        for index, (name, columns) in enumerate(
            (("a", slice(3)), ("b", slice(3)), ("c", slice(3, 6)))
        )
    ]
    pool.insert(last, pool.pop())
    parts = decompose(pool, method="mean", threshold=0.1)
    Z = double(parts.splits[0].basis)
    shared = [Z @ (Z.T @ dense(a.modules["m"])) for a in pool]
    norms = [np.linalg.norm(S) for S in shared]
    assert min(norms) < 1e-5 * max(norms)
    want = sum(n / sum(norms) * S for n, S in zip(norms, shared, strict=True))
    common = parts.common.modules["m"]
    assert np.linalg.norm(dense(common) - want) < 1e-5 * np.linalg.norm(want)
    assert "common" in parts.outputs()


@pytest.mark.parametrize(
    ("scaling", "scale_B"), [(1e-24, 1e-24), (1e20, 1e20), (1e-42, 1.0), (1e40, 1e-30), (1e45, 1.0)]
)
def test_common_is_right_where_the_scaling_leaves_the_range_of_float32(scaling, scale_B):
    pool = planted(scale_B=scale_B, scaling=scaling)
    parts = decompose(pool)
    require_common(parts, pool)
    assert "common" in parts.outputs()


# --- parts that are bias alone --------------------------------------------------------------------


def save_biased(path, index, big, small, bias):
    """A PEFT directory: a module that shares nothing, and a small one that shares all."""
    U = torch.linalg.qr(normal(32, 8, seed=5)).Q
    path.mkdir()
    prefix = "base_model.model."
    save_file(
        {
            f"{prefix}big.lora_B.weight": big * U[:, 2 * index : 2 * index + 2].contiguous(),
            f"{prefix}big.lora_A.weight": normal(2, 16, seed=index),
            f"{prefix}big.lora_B.bias": torch.zeros(32),
            f"{prefix}small.lora_B.weight": small * U[:, :2].contiguous(),
            f"{prefix}small.lora_A.weight": normal(2, 16, seed=8 + index),
            f"{prefix}small.lora_B.bias": bias * U[:, 0].contiguous(),
        },
        path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["big", "small"],
        "lora_bias": True,
        "base_model_name_or_path": "x",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("scope", ["all", "iterative"])
@pytest.mark.parametrize("way", ["memory", "files", "compact files"])
@folded(("big", "small", "bias"), [(1, 1e-8, 1), (1e9, 1e-3, 1), (1, 1e-8, 1e-12), (0, 0, 1)])
def test_a_part_that_is_bias_alone_is_kept(tmp_path, scope, way, big, small, bias):
    paths = [save_biased(tmp_path / f"a{i}", i, big, small, bias) for i in range(2)]
    lazy = [Adapter.from_pretrained(path, lazy=True) for path in paths]
    options = {"scope": scope, "target": "a0" if scope == "iterative" else None}
    if way == "memory":
        parts = decompose(lazy, **options).outputs()
        save_adapters({tmp_path / "out" / name: part for name, part in parts.items()})
        written = {name: tmp_path / "out" / name for name in parts}
    else:
        from devec.streaming.output_options import OutputOptions

        form = OutputOptions(compact=way != "files")
        written = decompose_to(tmp_path / "out", lazy, **vars(form), **options).written
    found = {name: Adapter.from_pretrained(path).modules for name, path in written.items()}
    total = torch.zeros(32)
    for name in ("a0-unique", "a0-shared"):
        if "small" in found.get(name, {}):
            delta = found[name]["small"]
            total = total + delta.scaling * delta.bias
    want = lazy[0].modules["small"].bias
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6 * bias)
    if small:  # otherwise no direction is shared, and all of the bias is unique
        assert "a0-shared" in written
        assert ("common" in written) == (scope == "all")


def test_parts_without_bias_are_left_out_as_before(tmp_path):
    paths = [save_biased(tmp_path / f"a{i}", i, 1, 1e-8, 0) for i in range(2)]
    lazy = [Adapter.from_pretrained(path, lazy=True) for path in paths]
    assert set(decompose(lazy).outputs()) == {"a0-unique", "a1-unique"}
    assert set(decompose_to(tmp_path / "out", lazy).written) == {"a0-unique", "a1-unique"}


def save_cancelling(path, index, dtype):
    """A PEFT directory with rows of A that are all alike, so that ΔW is (Σ b_j)·aᵀ."""
    path.mkdir()
    B = normal(24, 5, seed=index).half().double()
    B[:, 4] += 3.0 - 2 * index - B.sum(dim=1)
    A = normal(1, 40, seed=9).expand(5, 40).contiguous()
    tensors = {"x.lora_B.weight": B.to(dtype), "x.lora_A.weight": A.to(dtype)}
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 5, "target_modules": ["x"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scope", ["all", "iterative"])
def test_zero_is_detected_before_rounding_to_the_type_of_the_files(tmp_path, dtype, scope):
    """The factor of a unique part that is zero need not be: its columns cancel, unless rounded."""
    paths = [save_cancelling(tmp_path / f"a{i}", i, dtype) for i in range(2)]
    options = {"threshold": 0.5, "scope": scope, "target": "a0" if scope == "iterative" else None}
    lazy = [Adapter.from_pretrained(path, lazy=True) for path in paths]
    held = decompose([a.loaded() for a in lazy], **options).outputs()
    assert set(decompose_to(tmp_path / "out", lazy, **options).written) == set(held)
    if dtype == torch.float16:
        assert "a0-unique" not in held
        assert "a0-shared" in held


def test_rounding_is_reported_for_weights_and_biases_separately():
    original = Norms(1e3, 1e-3)
    assert Norms(1e-4, 1e-10).are_rounding_beside(original)
    assert not Norms(1e-4, 1e-8).are_rounding_beside(original)
    assert not Norms(1e-2, 0.0).are_rounding_beside(original)
    assert Norms().are_rounding_beside(Norms())
    assert not Norms(math.nan, 0.0).are_rounding_beside(original)
    assert not Norms(0.0, math.nan).are_rounding_beside(original)


def test_a_pair_that_shares_a_bias_alone_is_written():
    """The weights of what it shares are rounding beside the whole adapters."""
    pool = []
    for index, name in enumerate("ab"):
        U = torch.linalg.qr(normal(32, 8, seed=5)).Q
        big = Delta(U[:, 2 * index : 2 * index + 2], normal(2, 16, seed=index))
        small = Delta(1e-8 * U[:, :2], normal(2, 16, seed=8 + index), 1.0, U[:, 0].clone())
        pool.append(Adapter(name, {"big": big, "small": small}))
    pairs = decompose(pool, scope="pairwise").outputs()
    assert set(pairs) == {"a+b-shared"}
    bias = pairs["a+b-shared"].modules["small"].bias
    torch.testing.assert_close(bias, pool[0].modules["small"].bias, rtol=1e-5, atol=1e-6)


# --- NaN and infinity -----------------------------------------------------------------------------

CALLS = {
    "decompose": lambda a, b: decompose([a, b]),
    "decompose by mean": lambda a, b: decompose([a, b], method="mean"),
    "decompose pairs": lambda a, b: decompose([a, b], scope="pairwise"),
    "decompose a target": lambda a, b: decompose([b, a], scope="iterative", target="b"),
    "overlap": lambda a, b: overlap([a, b]),
    "compress": lambda a, b: compress(a, rank=1),  # noqa: ARG005
    "compress by energy": lambda a, b: compress(a, energy=0.5),  # noqa: ARG005
}


@pytest.mark.parametrize("name", CALLS)
@folded("factor", ["B", "A"])
@folded("value", [math.nan, math.inf, -math.inf])
@folded("dtype", [torch.float32, torch.float64])
def test_factors_that_are_not_finite_are_refused_by_name(name, factor, value, dtype):
    good, bad = (
        {"B": normal(OUT, 3, seed=s, dtype=dtype), "A": normal(3, IN, seed=s, dtype=dtype)}
        for s in (0, 1)
    )
    bad[factor][1, 1] = value
    a = Adapter("a", {"m0": Delta(**good), "m1": Delta(**bad)})
    b = Adapter("b", {"m0": Delta(**good), "m1": Delta(**good)})
    with pytest.raises(DevecError, match="NaN or infinity") as caught:
        CALLS[name](a, b)
    assert "'m1'" in str(caught.value)
    assert "'a'" in str(caught.value)


def test_a_dora_that_is_not_finite_is_refused_by_name():
    B, A, W = normal(OUT, 3, seed=0), normal(3, IN, seed=1), normal(OUT, IN, seed=2)
    m = (W + B @ A).norm(dim=1)
    m[3] = math.nan
    a = Adapter("a", {"m": Delta(B, A, 1.0, None, Magnitude(m, "out", HeldWeight(W, "base")))})
    for call in (
        lambda: decompose([a, Adapter("b", {"m": Delta(B, A)})]),
        lambda: overlap([a, Adapter("b", {"m": Delta(B, A)})]),
        lambda: compress(a, rank=2),
        lambda: as_lora(a, 2),
    ):
        with pytest.raises(DevecError, match=r"module 'm'.*NaN or infinity"):
            call()
