"""Decompositions in one worker and in two: the dense truth, whichever thread splits a stack."""

import threading
from dataclasses import replace

import numpy as np
import pytest

import devec
from devec import Adapter, DevecError
from support.adapters.dense_doras import Module, apart, low_rank
from support.patience import patience
from support.threads import one_and_two_threads
from support.truth.reference import BASES, deflate

pytestmark = one_and_two_threads

SHAPES = {"k": (40, 36), "q": (24, 30), "v": (33, 21), "x": (18, 26)}  # a stack each
NAMES = "abc"


def pools(axes):
    """Modules with base weights, adapters of them, and adapter → module → dense ΔW."""
    modules = {name: Module(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    adapters, truths = [], {}
    for adapter, axis in zip(NAMES, axes, strict=True):
        made = {
            name: module.lora(4) if axis == "lora" else module.dora(4, axis)
            for name, module in modules.items()
        }
        adapters.append(Adapter(adapter, {name: delta for name, (delta, _) in made.items()}))
        truths[adapter] = {name: truth for name, (_, truth) in made.items()}
    return modules, adapters, truths


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize(
    "axes", [("lora",) * 3, ("out", "out", "in"), ("lora", "out", "lora")], ids=" ".join
)
def test_a_pool(axes, method):
    modules, adapters, truths = pools(axes)
    parts = devec.decompose(adapters, threshold=0.5, method=method)
    assert [split.module for split in parts.splits] == list(SHAPES)
    for name, module in modules.items():
        Z = BASES[method]([low_rank(a.modules[name]) for a in adapters], 0.5)
        assert Z.shape[1] == 2
        for adapter in NAMES:
            truth = truths[adapter][name]
            shared, unique = (p[adapter].modules[name] for p in (parts.shared, parts.unique))
            assert apart(module.dense(shared), Z @ Z.T @ truth) < 1e-10
            assert apart(module.dense(unique), truth - Z @ Z.T @ truth) < 1e-10


@pytest.mark.parametrize("axes", [("lora",) * 3, ("out", "lora", "in")], ids=" ".join)
def test_pairs(axes):
    modules, adapters, truths = pools(axes)
    parts = devec.decompose(adapters, threshold=0.5, scope="pairwise")
    for name, module in modules.items():
        low = [low_rank(a.modules[name]) for a in adapters]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            pair = NAMES[i], NAMES[j]
            Z = BASES["chain"]([low[i], low[j]], 0.5)
            shares = [Z @ Z.T @ truths[one][name] for one in pair]
            sizes = [np.linalg.norm(share) for share in shares]
            want = (sizes[0] * shares[0] + sizes[1] * shares[1]) / sum(sizes)
            assert apart(module.dense(parts.shared["+".join(pair)].modules[name]), want) < 1e-9


@pytest.mark.parametrize("axes", [("lora",) * 3, ("out", "lora", "in")], ids=" ".join)
def test_a_target(axes):
    modules, adapters, truths = pools(axes)
    parts = devec.decompose(adapters, threshold=0.5, scope="iterative", target="a")
    for name, module in modules.items():
        low = [low_rank(a.modules[name]) for a in adapters]
        removed, _ = deflate(low[0], low[1:], 0.5)
        U = np.linalg.svd(removed)[0][:, :2]
        shared = U @ U.T @ truths["a"][name]
        assert apart(module.dense(parts.shared["a"].modules[name]), shared) < 1e-9
        assert (
            apart(module.dense(parts.unique["a"].modules[name]), truths["a"][name] - shared) < 1e-9
        )


class Watched:
    """A base weight that calls `enter` before it is read."""

    def __init__(self, base, enter):
        self.base, self.source, self.enter = base, base.source, enter

    def read(self, dtype, device):
        self.enter()
        return self.base.read(dtype, device)


def watched(adapters, enter):
    """DoRAs whose base weights call `enter` with the name of their module before they are read."""

    def wrapped(module, delta):
        base = Watched(delta.gain.base, lambda: enter(module))
        return replace(delta, gain=replace(delta.gain, base=base))

    return [adapter.map(wrapped) for adapter in adapters]


def test_as_many_workers_run_at_the_same_time_as_torch_has_threads(torch_threads):
    """Each waits in its first stack for the others, which one worker alone would do for ever."""
    modules, adapters, _ = pools(("out",) * 3)
    meeting, seen = threading.Barrier(torch_threads), []

    def enter(_):
        name = threading.current_thread().name
        if name.startswith("devec-stacks") and name not in seen:
            seen.append(name)
            meeting.wait(patience())

    parts = devec.decompose(watched(adapters, enter), threshold=0.5)
    assert sorted(seen) == [f"devec-stacks_{i}" for i in range(torch_threads)]
    assert [split.module for split in parts.splits] == list(modules)


def test_an_error_in_a_worker_is_that_of_the_first_stack_and_ends_the_work():
    _, adapters, _ = pools(("out",) * 3)
    entered, failing = [], True

    def enter(module):
        entered.append((module, threading.current_thread().name))
        if failing and module in ("q", "v"):
            raise DevecError(f"no base weight of {module}")

    pool = watched(adapters, enter)
    for _ in range(5):
        with pytest.raises(DevecError, match="no base weight of q"):
            devec.decompose(pool, threshold=0.5)
    assert all(name.startswith("devec-stacks") for module, name in entered if module == "q")
    count = len(entered)
    failing = False
    assert len(devec.decompose(pool, threshold=0.5).splits) == len(SHAPES)
    assert len(entered) > count
