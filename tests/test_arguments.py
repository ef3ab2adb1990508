"""Numbers of any kind as arguments, and what is refused in their place."""

import json
import math
from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch

from devec import Adapter, Delta, DevecError, as_lora, combine, compress, decompose, distance
from devec.arguments import number, numbers, whole_number
from devec.errors import IncompatibleError
from devec.streaming.output_options import OutputOptions
from support.adapters.cases import make_pool
from support.shape_checks import unchecked


@pytest.fixture(autouse=True)
def _as_users_call_it():
    """Without the checks of types that the tests add, so that devec's own are seen."""
    with unchecked():
        yield


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return [Adapter.from_pretrained(p) for p in make_pool(tmp_path_factory.mktemp("pool"))]


HALVES = [
    0.5,
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16),
    Fraction(1, 2),
    Decimal("0.5"),
]


@pytest.mark.parametrize("half", HALVES, ids=lambda x: f"{type(x).__module__}.{type(x).__name__}")
def test_any_kind_of_number_is_a_weight(tmp_path, pool, half):
    a, b = pool
    want = combine([a, b], [0.5, -1.0])
    for total in (combine([a, b], [half, -1]), half * a - b, a / (1 / half) - b, a * half - b):
        assert isinstance(total, Adapter)
        assert total == want
    written = combine([a, b], [half, -1.0]).save_pretrained(tmp_path / "sum")
    record = json.loads((written / "devec.json").read_text())
    assert record["parameters"]["weights"] == [0.5, -1.0]
    delta = next(iter(a.modules.values()))
    assert isinstance(half * delta, Delta)
    assert torch.equal((half * delta).B, (0.5 * delta).B)
    assert torch.equal((delta / half).B, (delta / 0.5).B)


@pytest.mark.parametrize(
    "weights",
    [
        np.array([1.0, 0.5], dtype=np.float32),
        np.array([1, 2]),
        torch.tensor([1.0, 0.5]),
        (1, Fraction(1, 3)),
        {"a": 1.0, "b": 0.5}.values(),
    ],
    ids=lambda w: type(w).__name__,
)
def test_any_sequence_of_numbers_is_one_of_weights(pool, weights):
    want = combine(pool, [float(w) for w in weights])
    assert combine(pool, weights) == want


@pytest.mark.parametrize("four", [4, np.int64(4), np.uint8(4), torch.tensor(4), np.array(4)])
def test_any_kind_of_whole_number_is_a_rank(tmp_path, pool, four):
    compressed = compress(pool[0], rank=four).adapter
    assert {d.rank for d in compressed.modules.values()} == {4}
    compressed.save_pretrained(tmp_path / "compressed")
    as_lora(pool[0], four).adapter.save_pretrained(tmp_path / "lora")
    path = pool[0].save_pretrained(tmp_path / "again")
    assert Adapter.from_pretrained(path, max_rank=four) == pool[0]


@pytest.mark.parametrize("most", [0.9, np.float32(0.9), Fraction(9, 10), torch.tensor(0.9)])
def test_any_kind_of_number_is_an_energy_or_a_threshold(pool, most):
    compressed = compress(pool[0], energy=most)
    assert compressed.error == pytest.approx(compress(pool[0], energy=0.9).error)
    parts = decompose(pool, threshold=most)
    assert type(parts.record["parameters"]["threshold"]) is float
    assert parts.record["parameters"]["threshold"] == pytest.approx(0.9)


REFUSED = [
    ({0.5, 1.0}, "the order of a set is chance"),
    (frozenset({0.5, 1.0}), "the order of a set is chance"),
    ({1.0: "a", 0.5: "b"}, "weights are a list of numbers"),
    ("12", "weights are a list of numbers"),
    (b"12", "weights are a list of numbers"),
    (1.0, "weights are a list of numbers"),
    (np.array(1.0), "weights are a list of numbers"),
    ((w for w in (1.0, 0.5)), "weights are a list of numbers"),
    ([1.0, "0.5"], "each of the weights must be a number, got '0.5'"),
    ([1.0, 1j], "each of the weights must be a number"),
    ([1.0, True], "each of the weights must be a number, got True"),
    ([1.0, Decimal("sNaN")], "each of the weights must be a finite number"),
    (torch.ones(2, device="meta"), "each of the weights must be a number"),
    ([1.0, None], "each of the weights must be a number, got None"),
    ([1.0, math.nan], "each of the weights must be a finite number, got nan"),
    (np.array([1.0, np.inf]), "each of the weights must be a finite number, got inf"),
    ([1.0, 10**400], "each of the weights must be a finite number"),
    (np.ones((2, 2)), "each of the weights must be a number"),
]


@pytest.mark.parametrize(("weights", "message"), REFUSED, ids=lambda x: str(x)[:20])
def test_what_is_no_list_of_numbers_is_refused(pool, weights, message):
    with pytest.raises(IncompatibleError, match=message):
        combine(pool, weights)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)])
def test_nothing_is_divided_by_zero(pool, zero):
    for value in (pool[0], next(iter(pool[0].modules.values()))):
        with pytest.raises(IncompatibleError, match="must not be zero"):
            value / zero


def test_large_integers_are_weights(pool):
    assert (pool[0] * 10**20).norm() == pytest.approx(1e20 * pool[0].norm(), rel=1e-6)
    delta = next(iter(pool[0].modules.values()))
    assert (delta * 10**20).norm() == pytest.approx(1e20 * delta.norm(), rel=1e-6)


def test_the_rank_of_a_form_is_a_whole_number():
    assert type(OutputOptions(as_lora=np.int64(2)).as_lora) is int
    with pytest.raises(DevecError, match="must be a whole number"):
        OutputOptions(as_lora=2.5)


@pytest.mark.parametrize("weight", ["2", None, math.nan, 1j, [1.0]])
def test_what_is_no_number_is_no_factor(pool, weight):
    delta = next(iter(pool[0].modules.values()))
    for value in (pool[0], delta):
        with pytest.raises(DevecError, match="must be a"):
            value * weight
        with pytest.raises(DevecError, match="must be a"):
            value / weight


@pytest.mark.parametrize("rank", [4.0, "4", True, None, np.float32(4), torch.ones(1, 1)])
def test_what_is_no_whole_number_is_no_rank(pool, rank):
    with pytest.raises(DevecError):
        as_lora(pool[0], rank)
    with pytest.raises(DevecError):
        compress(pool[0], rank=rank)


@pytest.mark.parametrize(
    "threshold",
    ["high", True, np.bool_(True), 0, np.float32(1.5), math.nan, None, 1j, np.array([0.5, 0.6])],
)
def test_what_is_no_threshold_is_refused(pool, threshold):
    with pytest.raises(DevecError, match="threshold must be"):
        decompose(pool, threshold=threshold)


@pytest.mark.parametrize("scaling", [np.float32(0.5), Fraction(1, 2), torch.tensor(0.5)])
def test_a_scaling_is_a_number_of_python(scaling):
    delta = Delta(torch.ones(3, 1), torch.ones(1, 2), scaling)
    assert type(delta.scaling) is float
    assert delta.scaling == 0.5


@pytest.mark.parametrize("scaling", [math.nan, math.inf, "1"])
def test_a_scaling_is_finite(scaling):
    with pytest.raises(DevecError, match="scaling must be a"):
        Delta(torch.ones(3, 1), torch.ones(1, 2), scaling)


def test_numbers_keep_whether_they_are_whole():
    assert [type(x) for x in numbers([1, 2.0, np.int32(3)], "weights")] == [int, float, int]
    assert type(number(np.float64(1.0), "x")) is float
    assert type(whole_number(np.int8(1), "x")) is int


def test_a_list_that_changes_afterwards_changes_nothing(tmp_path, pool):
    paths = [a.save_pretrained(tmp_path / a.name) for a in pool]
    lazy = [Adapter.from_pretrained(path, lazy=True) for path in paths]
    weights = np.array([1.0, 0.5])
    total = combine(lazy, weights, name="sum")
    weights[:] = 0
    lazy.reverse()
    want = combine(pool, [1.0, 0.5])
    assert distance(total, want) < 1e-6 * want.norm()
    written = Adapter.from_pretrained(total.save_pretrained(tmp_path / "sum"))
    assert written == want
    record = total.provenance["parameters"]["weights"]
    assert record == [1.0, 0.5]
    record[1] = 100.0
    assert distance(total, want) < 1e-6 * want.norm()


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_adapters_own_their_modules_whatever_mapping_these_come_in(pool, kind):
    modules = dict(pool[0].modules)
    given = kind(modules)
    a = Adapter("a", given)
    (given if kind is UserDict else modules).clear()
    assert a == pool[0]
