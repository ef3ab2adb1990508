"""The engine splits every stack once, and gives each part to its sink."""

from contextlib import contextmanager

import pytest
import torch

from devec import Adapter, Delta
from devec.decomposition.engine import run
from devec.decomposition.in_memory import MemorySink
from devec.decomposition.question import PartName
from devec.decomposition.request import validated
from devec.decomposition.scopes import SCOPES
from devec.decomposition.stacks.build import stacks_of

MODULES = ("k", "q", "v")


def pool():
    """Three adapters of three modules of two shapes, one of them without the last module."""
    generator = torch.Generator().manual_seed(0)

    def delta(rows):
        factors = torch.randn(rows, 2, generator=generator), torch.randn(2, 5, generator=generator)
        return Delta(*factors)

    rows = dict(zip(MODULES, (6, 6, 9), strict=True))
    adapters = [Adapter(name, {m: delta(n) for m, n in rows.items()}) for name in "ab"]
    return [*adapters, Adapter("c", {m: delta(rows[m]) for m in MODULES[:-1]})]


class Recorder:
    """A sink that remembers what it was given."""

    def __init__(self):
        self.modules = []

    def accept(self, deltas):
        self.modules += deltas


def prepared(scope="all", target=None):
    """A question, its stacks and a recording sink for every part."""
    question, adapters = validated(pool(), 0.5, "chain", scope, target)
    modules = {adapter.name: adapter.modules for adapter in adapters}
    work = list(stacks_of(modules, None, batched=SCOPES[scope].batched))
    return question, work, {name: Recorder() for name in question.parts}


@pytest.mark.parametrize(
    ("scope", "target"), [("all", None), ("pairwise", None), ("iterative", "a")]
)
def test_every_sink_gets_the_modules_of_its_part_once(scope, target):
    question, work, sinks = prepared(scope, target)
    list(run(question, work, sinks))
    for name, sink in sinks.items():
        having = [{m for a in pool() if a.name == one for m in a.modules} for one in name.of]
        assert sorted(sink.modules) == sorted(set.intersection(*having)), name


def test_findings_come_in_the_order_of_the_stacks_and_progress_after_them():
    question, work, sinks = prepared()
    done, rows = [], []
    for findings in run(question, work, sinks, progress=done.append):
        rows += [row.module for row in findings.rows]
        assert len(done) < len(MODULES)
    assert rows == ["k", "q"]  # the last module is not in all adapters
    assert done == list(MODULES)


def test_shapes_are_kept_in_the_place_of_shared_bases():
    question, work, sinks = prepared()
    (row, *_) = [row for one in run(question, work, sinks, keep_bases=False) for row in one.rows]
    assert row.basis.device.type == "meta"
    assert row.basis.shape[0] == 6


def test_stacks_are_split_within_the_context_and_released_after_errors():
    question, work, sinks = prepared()
    within = []

    @contextmanager
    def around(stack):
        within.append(stack.modules)
        yield
        raise RuntimeError("after the stack")

    with pytest.raises(RuntimeError, match="after the stack"):
        list(run(question, work, sinks, around=around))
    assert within
    assert not any(stack._measured for stack in work)


def test_a_sink_in_memory_orders_modules_and_makes_zeros_of_originals():
    (a, *_) = pool()
    sink = MemorySink()
    sink.accept({"v": a.modules["v"]})
    sink.accept({"q": None, "k": a.modules["k"]})
    made = sink.modules(a.modules, MODULES)
    assert list(made) == list(MODULES)
    assert not made["q"].B.any()
    assert list(sink.modules({}, MODULES)) == ["k", "v"]


def test_parts_are_named_after_adapters_pairs_or_all():
    assert PartName("unique", ("a",)).label == "a-unique"
    assert PartName("shared", ("a", "b")).label == "a+b-shared"
    assert PartName("common", ("a", "b", "c")).label == "common"
