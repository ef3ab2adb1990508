"""Time of `devec decompose` for LLaMA-2-7B, compared with its matrix products alone."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.decompose import tables
from benchmarks.jobs import Job, JobRuns, measure
from benchmarks.pools import llama_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import start_up, times_in_turn

TITLE = "LLaMA-2-7B, PEFT, k = 8"
TEXT = """\
PEFT directories, bfloat16, measured as in the section on files. Besides the floor, devec is
compared with the time of the method's tall matrix products, at the rate at which this machine
multiplies matrices of these shapes in float32: (n × r)·(r × r), where n is a width of the model.
These products are counted for each module and adapter, with ρ shared directions: AAᵀ (2·in·r²);
BᵀB, the orthonormal basis B·R⁻¹ and the overlap with the next adapter's basis (2·out·r² each); ZᵀB
and Z·(ZᵀB) (4·out·ρ·r); (ZᵀB)·A (2·in·ρ·r). The rate is measured before and after each run of
devec, and the larger one is used, since the rate of a shared machine varies."""
SPACE = 3.5  # disk space relative to the inputs: the inputs, outputs of twice the size, and reserve
GEMM_LIMIT = 2.0
MEMORY_LIMIT = 600_000_000


def tall_flops(rows: int, columns: int, rank: int, k: int, shared: int) -> int:
    """Floating-point operations of the tall products for one module in factor space.

    For each of k adapters: the Gram matrices AAᵀ and BᵀB (2·in·r² and 2·out·r²), an orthonormal
    basis U = B·R⁻¹ (2·out·r²), the overlap U_iᵀU_{i+1} with the next adapter, cyclically
    (2·out·r²), ZᵀB and Z·(ZᵀB) (2·out·ρ·r each), (ZᵀB)·A for the common part (2·in·ρ·r). Products
    of r × r matrices are not counted.

    Args:
        rows: out.
        columns: in.
        rank: r.
        k: Number of adapters.
        shared: ρ, the shared rank.

    Returns:
        The number of operations; a multiplication with an addition counts as two.
    """
    grams = 2 * columns * rank**2 + 2 * rows * rank**2
    basis = 2 * rows * rank**2
    overlap = 2 * rows * rank**2
    split = 4 * rows * shared * rank
    common = 2 * columns * shared * rank
    return k * (grams + basis + overlap + split + common)


def total_flops(job: Job, runs: JobRuns) -> int:
    """The sum of `tall_flops` over all modules, with the shared ranks that devec reported."""
    ranks = [runs.shared.get(name, runs.shared.get(_bare(name), -1)) for name in job.shapes]
    if min(ranks) < 0:
        raise RuntimeError(f"devec reported no shared ranks of some modules of {job.title}")
    return sum(
        tall_flops(rows, columns, job.rank, job.k, shared)
        for (rows, columns), shared in zip(job.shapes.values(), ranks, strict=True)
    )


def _bare(name: str) -> str:
    """The name of a module without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


def gemm_rate(widths: list[int], rank: int, dtype: torch.dtype, repeats: int) -> float:
    """Floating-point operations per second of products (n × r)·(r × r), from median times."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    square = drawn(rank, rank)
    tall = {n: drawn(n, rank) for n in widths}
    times = times_in_turn({n: partial(torch.matmul, B, square) for n, B in tall.items()}, repeats)
    medians = [sorted(of_one)[len(of_one) // 2] for of_one in times.values()]
    return sum(2 * n * rank**2 for n in widths) / sum(medians)


def gemm_table(job: Job, runs: JobRuns, double: float) -> Table:
    """Time without start-up relative to the products; memory relative to the largest module."""
    flops = total_flops(job, runs)
    multiples = [t * rate / flops for t, rate in zip(runs.own_times(), runs.rates, strict=True)]
    single = median(runs.rates)
    row = {
        "products": flops,
        "rate, float32": single,
        "rate, float64": double,
        "time of products": flops / single,
        "devec without start-up": runs.without_start_up()["devec"],
        "multiple": median(multiples),
    }
    limit = MEMORY_LIMIT + 4 * max(map(job.factor_bytes, job.shapes))
    memory = f"{TITLE}, peak memory, 600 MB + 4 × the factors of the largest module"
    return Table(
        "The time of the products alone",
        dict(zip(row, ("TFLOP", "GFLOP/s", "GFLOP/s", "seconds", "seconds", "times"), strict=True)),
        [row],
        [
            Bar(
                f"{TITLE}, devec / products, without start-up", row["multiple"], GEMM_LIMIT, "times"
            ),
            Bar(memory, runs.peak(), limit, "bytes"),
        ],
    )


def section(settings: Settings) -> Section:
    """Measure eight adapters of all linear layers of LLaMA-2-7B, rank 256."""
    title = "Decompose LLaMA-2-7B"
    job = Job(TITLE, llama_shapes(), k=8, rank=256, peft=True)
    if settings.quick:
        job = Job(f"{TITLE}, tiny", llama_shapes(1, 64, 96), k=8, rank=8, peft=True)
    needed = SPACE * job.input_bytes()
    folder = settings.folder or Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"Left out: it needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free."
        return Section(title, TEXT, [Table(job.title, {}, [], notes=[reason])])
    start = start_up(settings.threads, settings.times(5))
    torch.set_num_threads(settings.threads)
    widths = sorted({n for shape in job.shapes.values() for n in shape})
    single, double = (
        partial(gemm_rate, widths, job.rank, dtype, settings.times(51))
        for dtype in (torch.float32, torch.float64)
    )
    runs = measure(job, settings, start, settings.times(3), single)
    return Section(title, TEXT, [*tables([(job, runs)], []), gemm_table(job, runs, double())])
