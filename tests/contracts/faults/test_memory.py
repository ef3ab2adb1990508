"""Too little memory: one message and no half output."""

import dataclasses
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from devec import DevecError
from devec.lazy import LazyMapping
from devec.streaming.decompose_to import decompose_to
from support.checks.leftovers import assert_nothing_but, before_reading, module_of
from support.checks.streamed import from_files
from support.processes.children import little_memory, run

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="open files are not replaced there"),
]

NO_MEMORY = {
    "of the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 123456 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "of Python": MemoryError,
    "of a GPU": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB.\n"
    ),
}


def _raise(error):
    raise error


@pytest.mark.parametrize("lacking", NO_MEMORY)
def test_too_little_memory_for_a_module_is_said(tmp_path, pool, lacking):
    first, second = from_files(pool)
    module = module_of(second)
    spoiled = before_reading(second, module, lambda: _raise(NO_MEMORY[lacking]()))
    with pytest.raises(DevecError, match=r"too little memory for .*MB.*OMP_NUM_THREADS") as error:
        decompose_to(tmp_path / "out", [first, spoiled])
    assert any(module in str(error.value) for module in second.modules)
    assert len(str(error.value).splitlines()) == 1
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("lacking", NO_MEMORY)
def test_too_little_memory_for_what_is_carried_is_said(tmp_path, plain, lacking):
    first, second = from_files(plain)
    known = {"head": torch.empty(3, device="meta")}
    spoiled = dataclasses.replace(
        second, carried=LazyMapping(known, lambda _: _raise(NO_MEMORY[lacking]()))
    )
    with pytest.raises(DevecError, match="too little memory"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path, plain):
    first, second = from_files(plain)
    spoiled = before_reading(second, "first.layer", lambda: _raise(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory hold on Linux only")
def test_a_limit_of_memory_below_that_of_one_module_is_said(tmp_path):
    pool = [tmp_path / "in" / f"{name}.safetensors" for name in "ab"]
    pool[0].parent.mkdir()
    for index, path in enumerate(pool):
        B = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(index))
        tensors = {"lora_unet_large.lora_up.weight": B.half()}
        tensors["lora_unet_large.lora_down.weight"] = torch.randn(16, 20).half()
        save_file(tensors, path)
    code, printed = run(
        tmp_path / "log",
        *("decompose", *pool, "--out", tmp_path / "out"),
        before=partial(little_memory, 25_000_000),
    )
    assert code == 2, printed
    assert "error: too little memory for 'lora_unet_large', which need about 115 MB" in printed
    assert "Traceback" not in printed
    assert_nothing_but(tmp_path, "in", "log")
