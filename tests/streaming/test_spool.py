"""Deltas spooled to the disk come back as they were."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from devec import Delta, DevecError
from devec.deltas.base_weight import HeldWeight
from devec.deltas.gains import Magnitude
from devec.lazy import outlines
from devec.streaming.spool import Spool, read_spools

OUT, IN = 7, 5


def lora(seed, rank=3, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(s, generator=generator).to(dtype) for s in ((OUT, rank), (rank, IN)))
    return Delta(B, A, 0.5, torch.randn(OUT, generator=generator) if bias else None)


BASE = HeldWeight(torch.arange(1, 36.0).reshape(OUT, IN) / 9)
KINDS = {
    "plain": lora(0),
    "bias": lora(1, bias=True),
    "bfloat16": lora(2, dtype=torch.bfloat16),
    "float64": lora(3, dtype=torch.float64),
    "two types": Delta(lora(4).B, lora(4).A.to(torch.float16)),
    "rank 0": lora(5, rank=0),
    "turned": Delta(lora(6).B, torch.randn(IN, 3, generator=torch.Generator().manual_seed(6)).mT),
    "magnitudes": Delta(
        lora(7).B, lora(7).A, gain=Magnitude(torch.linspace(2, 4, OUT), "out", BASE)
    ),
    "magnitudes of inputs": Delta(
        lora(8).B, lora(8).A, gain=Magnitude(torch.linspace(4, 8, IN), "in", BASE)
    ),
}


def tensors_of(delta):
    found = []
    delta.each(lambda tensor: found.append(tensor) or tensor)
    return found


def spooled(path, deltas):
    spool = Spool(path)
    for name, delta in deltas.items():
        spool.append(name, delta)
    spool.close()
    return path, spool.contents


def test_every_kind_comes_back_bit_by_bit(tmp_path):
    held = read_spools([spooled(tmp_path / "spool", KINDS)], dict.fromkeys(KINDS, BASE))
    assert list(held) == list(KINDS)
    for name, delta in KINDS.items():
        known = outlines(held)[name]
        assert known.B.is_meta
        assert (known.shape, known.rank, known.scaling) == (delta.shape, delta.rank, delta.scaling)
        assert held[name].same_as(delta), name
    torch.testing.assert_close(
        held["magnitudes"].resolved().B, KINDS["magnitudes"].resolved().B, rtol=0, atol=0
    )


def test_gains_of_both_axes_come_back(tmp_path):
    delta = KINDS["magnitudes"].resolved() + KINDS["magnitudes of inputs"].resolved()
    assert set(delta.gain.axes) == {"out", "in"}
    held = read_spools([spooled(tmp_path / "spool", {"q": delta})], {"q": BASE})
    for got, want in zip(tensors_of(held["q"]), tensors_of(delta), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert held["q"].norm() == delta.norm()


def test_later_changes_do_not_reach_the_spool(tmp_path):
    delta, want = lora(0), lora(0)
    path, held = spooled(tmp_path / "spool", {"q": delta})
    delta.B.zero_()
    assert read_spools([(path, held)], {})["q"].same_as(want)


def test_threads_may_spool_at_the_same_time(tmp_path):
    deltas = {f"m{i}": lora(i, rank=1 + i % 4) for i in range(60)}
    spool = Spool(tmp_path / "spool")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda item: spool.append(*item), deltas.items()))
    spool.close()
    held = read_spools([(spool.path, spool.contents)], {})
    assert held.keys() == deltas.keys()
    assert all(held[name].same_as(delta) for name, delta in deltas.items())


def test_several_spools_are_one_mapping(tmp_path):
    spools = [spooled(tmp_path / f"{i}", {f"m{i}": lora(i)}) for i in range(3)]
    empty = spooled(tmp_path / "empty", {})
    held = read_spools([*spools, empty], {})
    assert set(held) == {"m0", "m1", "m2"}
    assert all(held[f"m{i}"].same_as(lora(i)) for i in range(3))


def test_a_spool_that_was_cut_short_is_an_error(tmp_path):
    path, known = spooled(tmp_path / "spool", {"q": lora(0)})
    held = read_spools([(path, known)], {})
    with path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(DevecError, match="was changed while it was being read"):
        held["q"]
