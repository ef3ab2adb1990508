"""The memory of a decomposition from files to files does not grow with the pool."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from support.processes.children import start, two_threads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux"),
]

MODULES, SIZE, RANK = 24, 2560, 16
FACTORS = 2 * SIZE * RANK * 4  # bytes of a module's factors in the working precision
# Of up to four adapters of this size all modules are one stack; of more, several are at work.
FEW, SOME, MANY = 6, 10, 16


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Adapters of 4 MB each, of which the first four directions of every module are alike."""
    root = tmp_path_factory.mktemp("pool")
    common = torch.randn(SIZE, 4)
    paths = []
    for index in range(MANY):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for module in range(MODULES):
            B = torch.randn(SIZE, RANK, generator=generator)
            B[:, :4] = common + 0.05 * B[:, :4]
            A = B.roll(module, 0).mT.contiguous()
            name = f"lora_unet_blocks_{module}_attn"
            tensors[f"{name}.lora_up.weight"] = B.half()
            tensors[f"{name}.lora_down.weight"] = A.half()
            tensors[f"{name}.alpha"] = torch.tensor(8.0)
        paths.append(root / f"n{index}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def peak(directory, pool, *options):
    arguments = ("decompose", *pool, "--out", directory / "out", "--threshold", "0.5", *options)
    child = start(directory / "log", *arguments, before=two_threads)
    assert child.ends() == 0, child.printed
    assert "Written: " in child.printed
    for path in (directory / "out").iterdir():
        path.unlink()  # all of them are large
    return child.peak


@pytest.mark.parametrize(
    "options", [(), ("--scope", "iterative", "--target", "n0")], ids=["all", "iterative"]
)
def test_the_peak_is_bounded_and_does_not_grow_with_the_pool(tmp_path, pool, options):
    few = peak(tmp_path / "few", pool[:FEW], *options)
    many = peak(tmp_path / "many", pool, *options)
    assert 0 < few <= many * 1.1
    assert many <= few * 1.1
    assert many <= 600e6 + 4 * FACTORS


def test_the_peak_of_parts_that_are_put_by_is_bounded_too(tmp_path, pool):
    """Compact parts are held one adapter at a time."""
    few = peak(tmp_path / "few", pool[:FEW], "--compact")
    many = peak(tmp_path / "many", pool[:SOME], "--compact")
    assert 0 < many <= few * 1.1
