"""Decompositions of a pool: the dense truth, the laws, the scopes."""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devec import Adapter, Delta, DevecError, DevecWarning, decompose
from devec.decomposition.stacks.build import stacks_of
from support.adapters.cases import dense, make_pool, relative_error
from support.truth import reference

NAMES = "abcde"


def pool(k=2, seed=0, n=40, ranks=(6, 4, 5, 6, 3), shared=2, noise=0.15, modules=("q", "v")):
    """Adapters made in memory, with column spaces that partly agree."""
    adapters = []
    for i in range(k):
        deltas = {}
        for index, module in enumerate(modules):
            common = torch.Generator().manual_seed(1000 * seed + index)
            own = torch.Generator().manual_seed(1000 * seed + 10 * i + index + 500)
            B = torch.randn(n, ranks[i], generator=own)
            B[:, :shared] = torch.randn(n, shared, generator=common) + noise * B[:, :shared]
            A = torch.randn(ranks[i], 30, generator=own)
            deltas[module] = Delta(B, A, scaling=0.5 + i)
        adapters.append(Adapter(NAMES[i], deltas))
    return adapters


def dense_pool(adapters, module):
    return [dense(a.modules[module]) for a in adapters]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("threshold", [0.4, 0.85])
def test_scope_all_agrees_with_the_dense_reference(k, method, threshold):
    adapters = pool(k)
    parts = decompose(adapters, threshold=threshold, method=method)
    for split in parts.splits:
        module = split.module
        deltas = dense_pool(adapters, module)
        shared, unique, common, Z = reference.decompose(deltas, threshold, method)
        assert split.shared_rank == Z.shape[1] > 0
        for a, S, U in zip(adapters, shared, unique, strict=True):
            assert relative_error(dense(parts.shared[a.name].modules[module]), S) < 1e-5
            assert relative_error(dense(parts.unique[a.name].modules[module]), U) < 1e-5
        assert relative_error(dense(parts.common.modules[module]), common) < 1e-5
        assert parts.common.modules[module].rank == split.shared_rank


def test_principal_agrees_with_the_dense_reference():
    adapters = pool(2)
    parts = decompose(adapters, method="principal")
    for module in ("q", "v"):
        _, unique, _, _ = reference.decompose(dense_pool(adapters, module), 0.85, "principal")
        assert relative_error(dense(parts.unique["a"].modules[module]), unique[0]) < 1e-5


@pytest.mark.parametrize("method", ["chain", "mean", "principal"])
def test_scope_pairwise_agrees_with_the_dense_reference(method):
    adapters = pool(3)
    parts = decompose(adapters, method=method, scope="pairwise")
    assert list(parts.shared) == ["a+b", "a+c", "b+c"]
    assert (parts.unique, parts.common) == ({}, None)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for module in ("q", "v"):
            deltas = dense_pool([adapters[i], adapters[j]], module)
            want = reference.decompose(deltas, 0.85, method)[2]
            got = parts.shared[f"{NAMES[i]}+{NAMES[j]}"].modules[module]
            assert relative_error(dense(got), want) < 1e-5
    assert set(parts.spectrum) == {f"{p}/{m}" for p in ("a+b", "a+c", "b+c") for m in ("q", "v")}


@pytest.mark.parametrize("method", ["chain", "mean", "principal"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_scope_iterative_agrees_with_the_dense_reference(method, k):
    adapters = pool(k, noise=0.5)
    parts = decompose(adapters, threshold=0.6, method=method, scope="iterative", target="a")
    assert list(parts.unique) == list(parts.shared) == ["a"]
    for module in ("q", "v"):
        target, *others = dense_pool(adapters, module)
        shared, rest = reference.deflate(target, others, 0.6)
        assert relative_error(dense(parts.shared["a"].modules[module]), shared) < 1e-5
        assert relative_error(dense(parts.unique["a"].modules[module]), rest) < 1e-5
        rows = [s for s in parts.splits if s.module == module]
        assert [s.group for s in rows] == [("a", name) for name in NAMES[1:k]]
        assert [s.ranks[0] for s in rows] == [
            6 - sum(s.shared_rank for s in rows[:i]) for i in range(len(rows))
        ]


@given(st.integers(0, 200), st.sampled_from(["chain", "mean"]), st.floats(0.05, 1.0))
def test_parts_add_up_and_unique_has_nothing_in_the_shared_subspace(seed, method, threshold):
    adapters = pool(3, seed=seed, modules=("q",))
    parts = decompose(adapters, method=method, threshold=threshold)
    (split,) = parts.splits
    Z = split.basis.numpy()
    for a in adapters:
        shared, unique = (dense(p[a.name].modules["q"]) for p in (parts.shared, parts.unique))
        whole = dense(a.modules["q"])
        assert relative_error(shared + unique, whole) < 1e-6
        assert abs(Z.T @ unique).max(initial=0) < 1e-5 * abs(whole).max()
        assert relative_error(Z @ (Z.T @ shared), shared) < 1e-6
    for name, norm, part in zip(split.group, split.norms, split.shared_norms, strict=True):
        assert norm == pytest.approx(math.hypot(parts.unique[name].norm(), part), rel=1e-5)
        assert part == pytest.approx(parts.shared[name].norm(), rel=1e-5, abs=1e-6)


@given(st.integers(0, 200), st.sampled_from(["chain", "mean"]))
def test_gauge_does_not_matter(seed, method):
    adapters = pool(3, seed=seed, modules=("q",))
    g = torch.Generator().manual_seed(seed)

    def other_gauge(_, delta):
        G = torch.randn(delta.rank, delta.rank, generator=g).double()
        G += 4 * torch.eye(delta.rank)
        B, A = delta.B.double() @ G, torch.linalg.solve(G, delta.A.double())
        return Delta(B, A, delta.scaling)

    one = decompose(adapters, method=method, threshold=0.5)
    two = decompose([a.map(other_gauge) for a in adapters], method=method, threshold=0.5)
    for name in "abc":
        got, want = (dense(p.unique[name].modules["q"]) for p in (two, one))
        assert relative_error(got, want) < 1e-5


@given(st.permutations(range(4)))
def test_mean_does_not_depend_on_the_order(order):
    adapters = pool(4)
    one = decompose(adapters, method="mean")
    two = decompose([adapters[i] for i in order], method="mean")
    for name in "abcd":
        got, want = (dense(p.unique[name].modules["q"]) for p in (two, one))
        assert relative_error(got, want) < 1e-5
    assert relative_error(dense(two.common.modules["q"]), dense(one.common.modules["q"])) < 1e-5


@given(st.floats(0.1, 10))
def test_scaling_all_adapters_scales_all_parts(w):
    adapters = pool(3)
    one, two = decompose(adapters), decompose([w * a for a in adapters])
    assert relative_error(dense(two.common.modules["q"]), w * dense(one.common.modules["q"])) < 1e-5
    got, want = (dense(p.unique["b"].modules["q"]) for p in (two, one))
    assert relative_error(got, w * want) < 1e-5


def test_bias_changes_are_projected_with_their_module():
    a, b = pool(2, modules=("q",))
    a = a.map(lambda _, d: Delta(d.B, d.A, d.scaling, torch.randn(40)))
    parts = decompose([a, b])
    Z = parts.splits[0].basis.float()
    whole, shared, unique = (x.modules["q"].bias for x in (a, parts.shared["a"], parts.unique["a"]))
    torch.testing.assert_close(shared, Z @ (Z.mT @ whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared + unique, whole, rtol=1e-6, atol=1e-6)
    assert parts.shared["b"].modules["q"].bias is None


def test_a_module_that_one_adapter_lacks_is_unique():
    a, b, c = pool(3)
    b = Adapter("b", {"q": b.modules["q"]})
    parts = decompose([a, b, c])
    assert [s.module for s in parts.splits] == ["q"]
    assert relative_error(dense(parts.unique["a"].modules["v"]), dense(a.modules["v"])) == 0
    assert dense(parts.shared["a"].modules["v"]).any() == False  # noqa: E712
    assert "v" not in parts.common.modules
    assert "v" not in parts.unique["b"].modules


def test_a_zero_delta_shares_nothing():
    a, b = pool(2)
    b = 0 * b
    parts = decompose([a, b])
    assert parts.nothing_shared
    assert parts.splits[0].largest == 0
    assert list(parts.outputs()) == ["a-unique"]


def test_identical_adapters_share_everything_and_leave_no_empty_output():
    a, _ = pool(2)
    parts = decompose([a, Adapter("b", a.modules)])
    assert list(parts.outputs()) == ["a-shared", "b-shared", "common"]
    assert relative_error(dense(parts.common.modules["q"]), dense(a.modules["q"])) < 1e-6


def test_random_adapters_share_nothing_at_auto():
    adapters = pool(2, shared=0, n=200, modules=tuple("abcdefgh"))
    parts = decompose(adapters, threshold="auto")
    assert parts.nothing_shared
    assert all(s.edge < s.threshold < 1 for s in parts.splits)


def test_auto_finds_what_a_fixed_threshold_misses():
    adapters = pool(3, n=400, noise=0.9)
    assert decompose(adapters).nothing_shared
    for method in ("chain", "mean"):
        found = decompose(adapters, threshold="auto", method=method)
        assert all(s.shared_rank == 2 for s in found.splits)


def test_auto_selects_nothing_where_every_subspace_meets_every_other():
    adapters = pool(2, n=8)
    parts = decompose(adapters, threshold="auto")
    assert parts.nothing_shared
    assert all(s.threshold == math.inf and s.edge == 1 for s in parts.splits)


def test_compact_outputs_have_true_ranks_and_the_same_effect():
    adapters = pool(2)
    parts = decompose(adapters)
    full, compact = parts.outputs(), parts.outputs(compact=True)
    assert list(full) == list(compact)
    for name, adapter in compact.items():
        for module, delta in adapter.modules.items():
            assert relative_error(dense(delta), dense(full[name].modules[module])) < 1e-5
    assert {d.rank for d in compact["a-shared"].modules.values()} == {2}
    assert {d.rank for d in compact["a-unique"].modules.values()} == {4}  # Z is inside of it
    assert {d.rank for d in full["a-unique"].modules.values()} == {6}


def test_every_module_is_reported_as_it_is_done():
    done = []
    decompose(pool(2), progress=done.append)
    assert done == ["q", "v"]


def test_parts_of_modules_that_are_split_together_have_memory_of_their_own():
    shared = torch.randn(30, 2)

    def delta():
        return Delta(torch.cat([shared, torch.randn(30, 2)], dim=1), torch.randn(4, 20))

    before = torch.get_num_threads()
    got = decompose([Adapter(name, {f"m{i}": delta() for i in range(9)}) for name in "ab"])
    assert torch.get_num_threads() == before
    held = [
        d.B for part in (*got.unique.values(), *got.shared.values()) for d in part.modules.values()
    ]
    assert len({B.untyped_storage().data_ptr() for B in held}) == len(held) == 4 * 9
    assert all(B.untyped_storage().nbytes() == B.nbytes for B in held)


@pytest.mark.parametrize("scope", ["all", "pairwise"])
def test_nothing_is_kept_of_modules_that_are_done(monkeypatch, scope):
    module = importlib.import_module("devec.decomposition.engine")
    held = []

    def kept(*arguments, **options):
        held.extend(stacks_of(*arguments, **options))
        return held

    monkeypatch.setattr(module, "stacks_of", kept)
    adapters = [
        Adapter(n, {f"m{i}": Delta(torch.randn(9 + i, 2), torch.randn(2, 8)) for i in range(5)})
        for n in "abc"
    ]
    decompose(adapters, scope=scope)
    assert len(held) == 5
    assert not any(stack._measured or stack._bases or stack._kept for stack in held)


def test_parameters_are_split_and_results_are_not_tracked():
    B = torch.nn.Parameter(torch.randn(9, 2))
    other = Delta(torch.randn(9, 2), torch.randn(2, 8))
    got = decompose(
        [Adapter("a", {"m": Delta(B, other.A)}), Adapter("b", {"m": other})], threshold=1e-6
    )
    assert not any(d.B.requires_grad for d in got.shared["a"].modules.values())


def test_another_device_gives_the_same():
    adapters = pool(2)
    one, two = decompose(adapters), decompose(adapters, device="cpu")
    assert one.unique["a"] == two.unique["a"]
    with pytest.raises(DevecError, match="device 'cuda:99' cannot be used"):
        decompose(adapters, device="cuda:99")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0}, r"threshold must be in \(0, 1\] or 'auto', got 0"),
        ({"threshold": 1.01}, r"got 1.01"),
        ({"threshold": float("nan")}, r"got nan"),
        ({"threshold": "high"}, r"got 'high'"),
        ({"method": "median"}, r"method must be one of 'chain', 'mean', 'principal'"),
        ({"scope": "some"}, r"scope must be one of 'all', 'pairwise', 'iterative'"),
        ({"scope": "iterative"}, r"--target NAME\), one of 'a', 'b', 'c'; got None"),
        ({"scope": "iterative", "target": "z"}, r"got 'z'"),
        ({"target": "a"}, r"scope 'iterative' only"),
        ({"method": "principal"}, r"'principal' compares two adapters, got 3"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(DevecError, match=message):
        decompose(pool(3), **change)


def test_pools_that_do_not_fit_are_refused():
    a, b, _ = pool(3)
    with pytest.raises(DevecError, match="at least two adapters, got 1"):
        decompose([a])
    with pytest.raises(DevecError, match="'a' is given more than once"):
        decompose([a, b, a])
    (other,) = pool(1, n=41)
    with pytest.raises(DevecError, match=r"2 modules differ in shape \('q', 'v'\).*\(41, 30\)"):
        decompose([b, other])


def test_adapters_without_a_module_in_common_say_so():
    (a,) = pool(1)
    b = Adapter("b", {"k": a.modules["q"]})
    with pytest.warns(DevecWarning, match="no module in common"):
        parts = decompose([a, b])
    assert parts.nothing_shared
    assert list(parts.outputs()) == ["a-unique", "b-unique"]


def test_whole_tensors_go_to_unique_never_to_shared(tmp_path):
    paths = make_pool(tmp_path)
    a, b = (Adapter.from_pretrained(p) for p in paths)
    a = dataclasses.replace(a, carried={"head.weight": torch.ones(2)})
    parts = decompose([a, b])
    assert list(parts.unique["a"].carried) == ["head.weight"]
    assert not parts.shared["a"].carried
    assert not parts.common.carried


def test_auto_does_not_call_shared_what_an_adapter_lacks():
    g = torch.Generator().manual_seed(0)
    common = torch.randn(400, 1, generator=g)
    adapters = []
    for i, name in enumerate("abc"):
        B = torch.randn(400, 4, generator=g)
        if i < 2:
            B[:, :1] = common
        adapters.append(Adapter(name, {"q": Delta(B, torch.randn(4, 20, generator=g))}))
    for method in ("chain", "mean"):
        assert decompose(adapters, threshold="auto", method=method).nothing_shared
        two = decompose(adapters[:2], threshold="auto", method=method)
        assert two.splits[0].shared_rank == 1


@pytest.mark.parametrize("method", ["chain", "mean"])
def test_tiny_thresholds_select_nothing_that_is_zero(method):
    a, _ = pool(2)
    parts = decompose([a, Adapter("b", a.modules)], threshold=1e-12, method=method)
    assert [s.shared_rank for s in parts.splits] == [6, 6]
    assert parts.unique["a"].norm() < 1e-5 * a.norm()


def test_a_common_vector_that_cancels_is_not_written():
    a, _ = pool(2)
    outputs = decompose([a, dataclasses.replace(-a, name="b")]).outputs()
    assert set(outputs) == {"a-shared", "b-shared"}


def test_an_adapter_of_scaling_zero_shares_nothing():
    a, b = pool(2)
    off = b.map(lambda _, d: Delta(d.B, d.A, 0.0))
    parts = decompose([a, off])
    assert parts.nothing_shared
    assert parts.splits[0].ranks == (6, 0)


@pytest.mark.parametrize("adapters", [["anime", "pixel"], {"a": 1, "b": 2}])
def test_paths_are_no_adapters(adapters):
    with pytest.raises(DevecError, match=r"expected adapters, got str.*from_pretrained"):
        decompose(adapters)
