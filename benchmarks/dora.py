"""Time and memory of decomposing DoRAs in the shapes of LLaMA-2-7B.

    python -m benchmarks.dora

Two DoRA adapters of one module and the base weight are on the disk, as PEFT writes them; the
adapters share a quarter of their directions. They are read and decomposed, and the two unique parts
are converted to the tensors of their files: factors and magnitudes. Each shape is measured in its
own process. Memory is the growth of the peak during the first decomposition and conversion,
including pages of the base weight. The dense method is left out, as it takes minutes per module.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.results import Row, Section, Table, render_section
from benchmarks.settings import Settings
from devec import Adapter, decompose
from devec.adapters.data import contents_of

MODULE = "model.layers.0.mlp.down_proj"
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 256
TEXT = """\
Two DoRAs of one module, which share a quarter of their directions, are read from the disk together
with the base weight and decomposed (method chain); the unique parts are converted to the tensors of
their files. Memory is the growth of the peak, including pages of the base weight, as a multiple of
the base weight in float32. Each row is measured in its own process. The dense method is left out,
as it takes minutes per module."""


def write_pool(folder: Path, shape: tuple[int, int], rank: int, base: torch.dtype) -> None:
    """Write a base weight of a given dtype and two DoRAs that share a quarter of the directions."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator) / columns**0.5
    save_file({f"{MODULE}.weight": W.to(base)}, folder / "model.safetensors")
    common = torch.randn(rows, rank // 4, generator=generator)
    for name in ("first", "second"):
        B = torch.randn(rows, rank, generator=generator)
        B[:, : rank // 4] = common + 0.1 * B[:, : rank // 4]
        A = torch.randn(rank, columns, generator=generator) / columns**0.5
        m = W.norm(dim=1) * (1 + 0.05 * torch.randn(rows, generator=generator))
        key = f"base_model.model.{MODULE}"
        tensors = {"lora_A.weight": A, "lora_B.weight": 0.02 * B, "lora_magnitude_vector": m}
        (folder / name).mkdir()
        save_file(
            {f"{key}.{end}": tensor.bfloat16() for end, tensor in tensors.items()},
            folder / name / "adapter_model.safetensors",
        )
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "use_dora": True,
            "target_modules": [MODULE],
        }
        (folder / name / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def peak() -> int:
    """The peak resident memory of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def reset_peak() -> int:
    """Reset the peak to the current resident memory, and return it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def warm_up() -> None:
    """Load libraries and start threads, whose memory is not to be measured."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_pool(folder, (512, 512), 64, torch.float32)
        pool = [Adapter.from_pretrained(folder / n, base=folder) for n in ("first", "second")]
        for part in decompose(pool).unique.values():
            part.layout.stored(contents_of(part), None)  # type: ignore[union-attr]


def measure(shape: tuple[int, int], rank: int, base: str, repeats: int, threads: int) -> Row:
    """Median times and memory of one shape (out, in), measured in the calling process."""
    torch.set_num_threads(threads)
    times: dict[str, list[float]] = {"decompose": [], "write": []}
    grown = 0
    warm_up()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_pool(folder, shape, rank, BASES[base])
        adapters = [Adapter.from_pretrained(folder / n, base=folder) for n in ("first", "second")]
        before = reset_peak()
        for _ in range(repeats):
            start = time.perf_counter()
            parts = decompose(adapters)
            times["decompose"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for part in parts.unique.values():
                part.layout.stored(contents_of(part), None)  # type: ignore[union-attr]
            times["write"].append(time.perf_counter() - start)
            grown = grown or peak() - before
    return {
        "shared rank": parts.splits[0].shared_rank,
        **{what: statistics.median(of_kind) for what, of_kind in times.items()},
        "memory": grown / (4 * shape[0] * shape[1]),
    }


def rows(settings: Settings) -> Iterator[Row]:
    """Measure all shapes, each in its own process."""
    shapes: Sequence[tuple[int, int]] = SHAPES
    bases, rank = list(BASES), RANK
    if settings.quick:
        shapes, bases, rank = [(96, 64)], ["bfloat16"], 8
    context = multiprocessing.get_context("spawn")
    for shape in shapes:
        for base in bases:
            arguments = (shape, rank, base, settings.times(7), settings.threads)
            with context.Pool(1) as process:
                measured = process.apply(measure, arguments)
            yield {"module": f"{shape[0]} × {shape[1]}", "base weight": base, **measured}


def section(settings: Settings) -> Section:
    """Measure all shapes."""
    units = {
        "module": "",
        "base weight": "",
        "shared rank": "count",
        "decompose": "seconds",
        "write": "seconds",
        "memory": "times",
    }
    title = f"Rank {8 if settings.quick else RANK}, k = 2"
    return Section("DoRA", TEXT, [Table(title, units, list(rows(settings)))])


if __name__ == "__main__":
    print(render_section(section(Settings())))
