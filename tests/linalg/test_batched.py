"""Bases of many products at once: right wherever they are called sound, and exact elsewhere."""

import math

import pytest
import torch
from torch.testing import assert_close

from devec import Adapter, Delta, decompose
from devec.decomposition.stacks.build import sound_stacks
from devec.decomposition.stacks.exact import ExactModule
from devec.decomposition.stacks.lora import LoraStack
from devec.linalg.batched import column_bases
from devec.linalg.dtypes import RANK_RTOL
from support.adapters.cases import dense, relative_error
from support.folding import folded
from support.truth import reference

DTYPES = [torch.float32, torch.float64]
CONDITIONS = [10.0**power for power in range(1, 13)]
M, N, R = 60, 50, 6
NORM = {torch.float32: 1e-4, torch.float64: 1e-9}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spread(count, condition):
    """Positive numbers around 1, the largest so many times the smallest."""
    return torch.logspace(-0.5, 0.5, count, dtype=torch.float64) ** math.log10(condition)


def rotated(rows, columns, condition, seed=0):
    """A tall matrix of this condition number, which no scaling of its columns improves."""
    Q = torch.linalg.qr(normal(rows, columns, seed=seed)).Q
    V = torch.linalg.qr(normal(columns, columns, seed=seed + 1)).Q
    return Q * spread(columns, condition) @ V.T


def assert_right(B, A, found):
    """Whatever is called sound is orthonormal, spans the column space and has the right norms."""
    eps, rtol = torch.finfo(B.dtype).eps, RANK_RTOL[B.dtype]
    b, a, U, gram = (t[found.sound].double() for t in (B, A, found.U, found.gram))
    if not len(b):
        return
    S = torch.linalg.svdvals(b @ a)[:, : U.shape[-1]]
    assert (S[:, -1] > rtol * S[:, 0]).all()
    assert_close(U.mT @ U, torch.eye(U.shape[-1]).double().expand_as(gram), rtol=0, atol=1e-6)
    scaled = b / b.norm(dim=1, keepdim=True)
    Q = torch.linalg.qr(scaled).Q
    outside = torch.linalg.matrix_norm(U - Q @ (Q.mT @ U), ord=2)
    assert (outside < 20 * eps * torch.linalg.cond(scaled)).all()
    norms = found.norms[found.sound].double()
    assert_close(norms, S.norm(dim=1), rtol=NORM[B.dtype], atol=0)
    C = normal(3, a.shape[1], seed=5)
    got = (C @ gram @ C.T).diagonal(dim1=1, dim2=2).sum(1).sqrt()
    assert_close(got, torch.linalg.matrix_norm(C @ a), rtol=NORM[B.dtype], atol=0)


# --- what is sound is right -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "r", "n"), [(60, 6, 50), (300, 64, 200), (600, 128, 500), (7, 1, 5)])
def test_random_products_are_sound_and_right(dtype, m, r, n):
    B, A = normal(3, m, r).to(dtype), normal(3, r, n, seed=1).to(dtype)
    found = column_bases(B, A)
    assert found.sound.all()
    assert_right(B, A, found)


@pytest.mark.parametrize("side", ["B", "A", "both"])
@folded("dtype", DTYPES)
@folded("condition", CONDITIONS)
def test_any_condition_is_right_or_called_unsound(dtype, condition, side):
    B, A = normal(4, M, R), normal(4, R, N, seed=1)
    if side != "A":
        B = torch.stack([rotated(M, R, condition, seed) for seed in range(4)])
    if side != "B":
        A = torch.stack([rotated(N, R, condition, seed).T for seed in range(4, 8)])
    B, A = B.to(dtype), A.to(dtype)
    assert_right(B, A, column_bases(B, A))


@pytest.mark.parametrize("dtype", DTYPES)
@folded("condition", CONDITIONS)
def test_the_scaling_of_columns_does_not_matter(dtype, condition):
    """Columns of B scaled and rows of A scaled back are the same product."""
    scales = spread(R, condition)
    B, A = normal(4, M, R) * scales, normal(4, R, N, seed=1) / scales[:, None]
    B, A = B.to(dtype), A.to(dtype)
    found = column_bases(B, A)
    assert found.sound.all()
    assert_right(B, A, found)


@pytest.mark.parametrize("dtype", DTYPES)
@folded("condition", CONDITIONS)
def test_a_product_of_lower_numerical_rank_is_not_sound(dtype, condition):
    B, A = (normal(4, M, R) * spread(R, condition)).to(dtype), normal(4, R, N, seed=1).to(dtype)
    found = column_bases(B, A)
    assert_right(B, A, found)
    if condition * RANK_RTOL[dtype] > 10:
        assert not found.sound.any()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [500, 1024, 4096])
@folded("condition", [2, 5, 10, 30, 100, 300])
def test_long_columns_are_orthonormal_whether_or_not_there_is_a_second_pass(rows, condition):
    B = torch.stack([rotated(rows, 8, condition, seed) for seed in range(4)]).float()
    A = normal(4, 8, N, seed=1).float()
    assert_right(B, A, column_bases(B, A))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_the_size_of_a_product_does_not_matter(scale):
    B, A = normal(2, M, R).float(), normal(2, R, N, seed=1).float() * scale
    found = column_bases(B, A)
    assert found.sound.all()
    assert_right(B, A, found)


# --- what must not be called sound ------------------------------------------------------------


def deficient(rows, columns, seed):
    """A matrix whose last column is a combination of the others."""
    matrix = normal(rows, columns, seed=seed)
    matrix[:, -1] = matrix[:, :-1] @ normal(columns - 1, seed=seed + 1)
    return matrix


@pytest.mark.parametrize("side", ["B", "A", "zero B", "zero A", "zero column", "zero row", "twice"])
@folded("dtype", DTYPES)
@folded(("m", "r", "n"), [(60, 6, 50), (3000, 48, 200), (200, 48, 3000)])
def test_rank_deficient_products_are_never_sound(dtype, m, r, n, side):
    B, A = normal(8, m, r), normal(8, r, n, seed=1)
    if side == "B":
        B = torch.stack([deficient(m, r, seed) for seed in range(8)])
    elif side == "A":
        A = torch.stack([deficient(n, r, seed).T for seed in range(8)])
    elif side == "twice":
        B[..., -1] = 2 * B[..., 0]
    elif side in ("zero column", "zero row"):
        (B[..., 1] if "column" in side else A[:, 1]).zero_()
    else:
        (B if side.endswith("B") else A).zero_()
    assert not column_bases(B.to(dtype), A.to(dtype)).sound.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "r", "n"), [(6, 9, 50), (50, 9, 6), (6, 9, 6), (20, 21, 50)])
def test_wide_factors_are_never_sound(dtype, m, r, n):
    B, A = normal(40, m, r).to(dtype), normal(40, r, n, seed=1).to(dtype)
    assert not column_bases(B, A).sound.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_product_does_not_disturb_its_neighbours(dtype):
    B, A = normal(4, M, R).to(dtype), normal(4, R, N, seed=1).to(dtype)
    alone = column_bases(B, A)
    B[1, :, 2] = B[1, :, 0]
    B[2] = rotated(M, R, 50).to(dtype)  # sound, but only after a second pass
    found = column_bases(B, A)
    assert found.sound.tolist() == [True, False, True, True]
    assert_right(B, A, found)
    for index in (0, 3):
        for got, want in zip(found, alone, strict=True):
            assert_close(got[index], want[index], rtol=1e-5, atol=1e-6)


# --- decompositions of what is sound and of what is not -------------------------------------------


def ill(name, dtype, condition, side, seed, modules=3):
    """An adapter that shares two directions a module, whose factors are of a condition.

    Half of the singular values are of the order of 1, half of the order of 1/condition.
    """
    deltas = {}
    low = torch.tensor([1, 1.5, 2, 1.2 / condition, 1.6 / condition, 2 / condition]).double()
    for index in range(modules):
        common = normal(M, 2, seed=100 + index)
        own = normal(M, R - 2, seed=1000 * seed + index)
        Q = torch.linalg.qr(torch.cat([common[:, :1], own[:, :2], common[:, 1:], own[:, 2:]], 1)).Q
        V = torch.linalg.qr(normal(R, R, seed=seed + 7 * index)).Q
        P = torch.linalg.qr(normal(N, R, seed=2000 * seed + index)).Q
        B, A = (Q * low @ V.T, V @ P.T) if side == "B" else (Q @ V.T, V * low @ P.T)
        deltas[f"m{index}"] = Delta(B.to(dtype), A.to(dtype), 0.5 + seed)
    return Adapter(name, deltas)


# What is near RANK_RTOL of float32 is of one rank or the other by chance.
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("method", ["chain", "mean"])
def test_parts_agree_with_the_dense_truth_at_any_condition(condition, side, method):
    adapters = [ill(n, torch.float32, condition, side, i, 2) for i, n in enumerate("ab")]
    parts = decompose(adapters, threshold=0.6, method=method)
    for module in adapters[0].modules:
        deltas = [dense(a.modules[module]) for a in adapters]
        shared, unique, common, Z = reference.decompose(deltas, 0.6, method)
        [split] = [s for s in parts.splits if s.module == module]
        assert split.shared_rank == Z.shape[1] > 0
        assert split.ranks == (R,) * 2 if condition < 1e6 else (R // 2,) * 2
        for a, S, W in zip(adapters, shared, unique, strict=True):
            assert relative_error(dense(parts.shared[a.name].modules[module]), S) < 2e-5
            assert relative_error(dense(parts.unique[a.name].modules[module]), W) < 2e-5
        assert relative_error(dense(parts.common.modules[module]), common) < 2e-5


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("method", ["chain", "mean"])
def test_in_float64_all_of_an_adapter_is_shared_with_itself(condition, method):
    """Also at the threshold 1, which only rounding may miss."""
    adapter = ill("a", torch.float64, condition, "B", 0)
    parts = decompose([adapter, Adapter("b", adapter.modules)], threshold=1.0, method=method)
    assert [split.shared_rank for split in parts.splits] == [R] * 3
    assert parts.unique["a"].norm() < 1e-9 * adapter.norm()


def mixed_pool(k=3):
    """Modules of one shape, some of which no basis is right for that is found with the others'."""
    adapters = [ill(name, torch.float32, 10, "B", i, modules=6) for i, name in enumerate("abc"[:k])]
    odd = dict(adapters[1].modules)
    odd["m1"] = Delta(odd["m1"].B.clone(), odd["m1"].A, 2.0)
    odd["m1"].B[:, 5] = odd["m1"].B[:, 0]
    odd["m3"] = Delta(0 * odd["m3"].B, odd["m3"].A)
    return [adapters[0], Adapter("b", odd), *adapters[2:]]


@pytest.mark.parametrize(
    "options",
    [
        *({"method": m, "threshold": t} for m in ("chain", "mean") for t in (0.6, "auto")),
        {"scope": "pairwise"},
        {"scope": "pairwise", "method": "principal"},
        {"scope": "iterative", "target": "b"},
    ],
    ids=str,
)
def test_modules_are_split_together_as_they_are_alone(options):
    adapters = mixed_pool()
    together = decompose(adapters, **options)
    assert any(split.shared_rank for split in together.splits)
    for module in adapters[0].modules:
        alone = decompose(
            [Adapter(a.name, {module: a.modules[module]}) for a in adapters], **options
        )
        for kind in ("unique", "shared"):
            for name, adapter in getattr(alone, kind).items():
                for got, want in zip(
                    _of(getattr(together, kind)[name], module), _of(adapter, module), strict=True
                ):
                    assert relative_error(got, want) < 1e-5
        got, want = (
            [
                (s.group, s.ranks, s.shared_rank, s.threshold, len(s.spectrum))
                for s in p.splits
                if s.module == module
            ]
            for p in (together, alone)
        )
        assert got == want


def test_parts_do_not_keep_the_memory_of_other_modules():
    parts = decompose(mixed_pool(), threshold=0.6)
    for adapter in (*parts.unique.values(), *parts.shared.values(), parts.common):
        for delta in adapter.modules.values():
            assert delta.B.untyped_storage().nbytes() == delta.B.nbytes


def test_bases_that_all_pairs_need_are_computed_once(monkeypatch):
    computed = []

    def counted(B, A, rtol):
        computed.append(B)
        return column_bases(B, A, rtol)

    monkeypatch.setattr("devec.decomposition.stacks.lora.column_bases", counted)
    adapters = [ill(name, torch.float32, 10, "B", i, modules=2) for i, name in enumerate("abcd")]
    decompose(adapters, scope="pairwise")
    assert len(computed) == 4


def _of(adapter, module):
    """ΔW of a module, if the adapter has it."""
    return [dense(adapter.modules[module])] if module in adapter.modules else []


def test_only_the_unsound_modules_are_looked_at_one_by_one():
    adapters = mixed_pool()
    stack = LoraStack(list(adapters[0].modules), {a.name: a.modules for a in adapters}, None)
    parts = sound_stacks(stack, {"m1", "m3"})
    assert [(type(s), s.modules) for s in parts] == [
        (ExactModule, ("m1",)),
        (ExactModule, ("m3",)),
        (LoraStack, ("m0", "m2", "m4", "m5")),
    ]


def test_what_the_caller_has_chosen_for_a_model_does_not_matter():
    """Autocast would halve the precision."""
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            name, {"q": Delta(torch.randn(40, 4, generator=generator), torch.ones(4, 30).triu())}
        )
        for name in "ab"
    ]
    want = decompose(adapters, threshold=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = decompose(adapters, threshold=0.01)
    assert want.splits[0].shared_rank > 0
    for name in "ab":
        assert_close(
            got.unique[name].modules["q"].B, want.unique[name].modules["q"].B, rtol=0, atol=0
        )


def precisions():
    """In what float32 may be multiplied: for all, by CUDA, and by each backend since torch 2.9."""
    backends = (getattr(b, "matmul", None) for b in (torch.backends.cuda, torch.backends.mkldnn))
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        *(b.fp32_precision for b in backends if hasattr(b, "fp32_precision")),
    )


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_float32_is_not_multiplied_in_less(allowed):
    """TF32, or bfloat16, that a caller allows for a model is not for bases, and stays allowed."""
    default = torch.get_float32_matmul_precision()
    adapters = [ill(name, torch.float32, 10, "B", i) for i, name in enumerate("ab")]
    seen = []
    try:
        torch.set_float32_matmul_precision(allowed)
        before = precisions()
        decompose(adapters, progress=lambda _: seen.append(precisions()))
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision(default)
    assert seen
    for for_all, tf32, *backends in seen:
        assert (for_all, tf32) == ("highest", False)
        assert not {"tf32", "bf16"} & set(backends)


def test_settings_of_one_backend_are_heeded_too():
    backend, seen = torch.backends.cuda.matmul, []
    default = backend.fp32_precision
    adapters = [ill(name, torch.float32, 10, "B", i) for i, name in enumerate("ab")]
    try:
        backend.fp32_precision = "tf32"
        decompose(adapters, progress=lambda _: seen.append(backend.fp32_precision))
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = default
    assert set(seen) == {"ieee"}


def test_rows_of_any_condition_are_sound():
    """Norms and ranks are right where A·Aᵀ has to be computed in float64."""
    B, A = normal(1, 200, 12).float(), normal(1, 12, 150, seed=1).float()
    A[0, 1] = A[0, 0] + 1e-4 * A[0, 1]
    found = column_bases(B, A)
    assert found.sound.all()
    B, A = B.double(), A.double()
    assert_close(found.norms, torch.linalg.matrix_norm(B @ A), rtol=1e-6, atol=0)
    assert_close(found.gram, A @ A.mT, rtol=1e-12, atol=1e-12)
