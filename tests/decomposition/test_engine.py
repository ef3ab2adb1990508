"""The engine splits every stack once, and gives each part to its sink."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from devec import Adapter, Delta, DevecWarning
from devec.decomposition.engine import run
from devec.decomposition.in_memory import MemorySink
from devec.decomposition.question import PartName
from devec.decomposition.request import validated
from devec.errors import warn

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
    """A request, and a recording sink for every part."""
    request = validated(pool(), 0.5, "chain", scope, target)
    return request, {name: Recorder() for name in request.parts}


@pytest.mark.parametrize(
    ("scope", "target"), [("all", None), ("pairwise", None), ("iterative", "a")]
)
def test_every_sink_gets_the_modules_of_its_part_once(scope, target):
    request, sinks = prepared(scope, target)
    run(request, sinks)
    for name, sink in sinks.items():
        having = [{m for a in pool() if a.name == one for m in a.modules} for one in name.of]
        assert sorted(sink.modules) == sorted(set.intersection(*having)), name


def test_progress_names_every_module_once_in_the_order_of_the_findings():
    request, sinks = prepared()
    done = []
    findings = run(request, sinks, progress=done.append)
    assert [row.module for row in findings.rows] == ["k", "q"]  # the last is not in all adapters
    assert done == list(MODULES)


def test_shapes_are_kept_in_the_place_of_shared_bases():
    request, sinks = prepared()
    row, *_ = run(request, sinks, keep_bases=False).rows
    assert row.basis.device.type == "meta"
    assert row.basis.shape[0] == 6


def test_a_process_splits_its_share_of_the_stacks():
    request, sinks = prepared()
    findings = run(request, sinks, share=lambda stacks: stacks[:1])
    assert [row.module for row in findings.rows] == ["k", "q"]
    assert all(set(sink.modules) <= {"k", "q"} for sink in sinks.values())


def test_stacks_are_split_within_the_context_and_released_after_errors():
    request, sinks = prepared()
    within = []

    @contextmanager
    def around(stack):
        within.append(stack)
        yield
        raise RuntimeError("after the stack")

    with pytest.raises(RuntimeError, match="after the stack"):
        run(request, sinks, around=around)
    assert within
    assert not any(stack._measured for stack in within)


def test_warnings_of_worker_threads_are_issued_in_the_calling_thread():
    request, sinks = prepared()

    def warned(_):
        warn("of a part")

    for sink in sinks.values():
        sink.accept = warned
    with pytest.warns(DevecWarning, match="of a part") as caught:
        run(request, sinks)
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


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
