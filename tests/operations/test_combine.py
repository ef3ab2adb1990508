"""Sums of adapters whose modules are read when they are asked for."""

import dataclasses
import sys

import pytest
import torch

from devec import Adapter, combine
from devec.errors import FormatError
from devec.lazy import LazyMapping, outlines
from support.adapters.cases import make_pool, save_kohya
from support.adapters.peft_doras import read, save_dora
from support.checks.streamed import contents, from_files
from support.processes.children import run, start

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WEIGHTS = (1.0, -0.5, 0.25)


@pytest.fixture(params=["peft", "kohya", "both"])
def pool(tmp_path, request):
    """Adapters of one kind of file, or of which one has modules that the other has not."""
    if request.param == "peft":
        return make_pool(tmp_path / "in", k=3)
    made = [save_kohya(tmp_path / "in" / f"{name}.safetensors", i) for i, name in enumerate("abc")]
    if request.param == "both":
        whole = Adapter.from_pretrained(made[0])
        half = dict(list(whole.modules.items())[:2])
        dataclasses.replace(whole, modules=half, name="a").save_pretrained(made[0], overwrite=True)
    return made


@pytest.mark.parametrize("weights", [WEIGHTS, (1, 1, 1), (0, -2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_they_are_written_as_sums_in_memory_are(tmp_path, pool, weights, dtype):
    for lazy in (True, False):
        total = combine(from_files(pool, lazy=lazy), weights, name="sum")
        assert isinstance(total.modules, LazyMapping) == lazy
        total.save_pretrained(tmp_path / str(lazy), dtype=dtype)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_what_is_known_beforehand_is_what_is_read(pool):
    total = combine(from_files(pool), WEIGHTS)
    for module, known in outlines(total.modules).items():
        assert known.B.is_meta
        delta = total.modules[module]
        assert (known.shape, known.rank, known.scaling) == (delta.shape, delta.rank, delta.scaling)
        assert (known.B.dtype, known.A.dtype) == (delta.B.dtype, delta.A.dtype)


def test_nothing_is_read_before_it_is_asked_for(pool):
    total = combine(from_files(pool), WEIGHTS)
    file = pool[1] if pool[1].is_file() else pool[1] / "adapter_model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(FormatError, match="was changed while it was being read"):
        dict(total.modules)


def test_multiples_of_multiples_are_lazy_too(pool):
    lazy, held = (from_files(pool, lazy=kind)[0] for kind in (True, False))
    assert isinstance((-(2 * lazy)).modules, LazyMapping)
    assert -(2 * lazy) == -2 * held


def test_adapters_in_memory_may_be_among_them(pool):
    first, *others = from_files(pool)
    assert combine([first.loaded(), *others], WEIGHTS) == combine(
        from_files(pool, lazy=False), WEIGHTS
    )


def test_sums_with_doras_are_made_at_once(tmp_path):
    path = save_dora(tmp_path / "a", "linear")
    lazy = Adapter.from_pretrained(path, lazy=True, base=read(path, "linear").layout.base.reference)
    assert combine([lazy], [0.5]) == combine([read(path, "linear")], [0.5])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux")
def test_the_memory_of_a_sum_does_not_grow_with_the_pool(tmp_path):
    """Each adapter holds 40 MB in eighty modules."""
    from safetensors.torch import save_file

    paths = []
    for index in range(8):
        tensors = {}
        for module in range(80):
            name = f"lora_unet_blocks_{module}_attn"
            tensors[f"{name}.lora_up.weight"] = torch.full((2048, 64), 0.1 + index).half()
            tensors[f"{name}.lora_down.weight"] = torch.full((64, 2048), 0.1).half()
        paths.append(tmp_path / f"n{index}.safetensors")
        save_file(tensors, paths[-1])

    def peak(k):
        weights = ",".join(["1"] * k)
        out = tmp_path / f"{k}.safetensors"
        child = start(
            tmp_path / f"log{k}", "combine", *paths[:k], "--weights", weights, "--out", out
        )
        assert child.ends() == 0, child.printed
        return child.peak

    few, many = peak(2), peak(8)
    assert many - few < 6 * 40e6 / 3  # of the inputs that are more most is never held


@pytest.mark.slow
def test_a_sum_may_take_the_place_of_what_it_is_made_of(tmp_path, pool):
    first, want = pool[0], combine(from_files(pool, lazy=False)[:1], [-1.0])
    code, printed = run(tmp_path / "log", "negate", first, "--out", first, "--overwrite")
    assert code == 0, printed
    assert Adapter.from_pretrained(first) == want
