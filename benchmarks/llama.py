"""How long `devec decompose` takes for LLaMA-2-7B, beside its products of matrices alone."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.decompose import tables
from benchmarks.jobs import Job, Timed, measure
from benchmarks.pools import llama_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import rivals, start_up

TITLE = "LLaMA-2-7B, PEFT, k = 8"
TEXT = """\
PEFT directories, bfloat16, as in the section on files. Beside the floor there is the time that the
tall products of the method would take at the rate at which this machine multiplies such matrices
in float32: (n × r)·(r × r), n the widths of the model. Counted for every module and adapter, with ρ
shared directions: AAᵀ (2·in·r²), BᵀB, the orthonormal basis B·R⁻¹ and the overlap with the next
adapter's basis (2·out·r² each), ZᵀB and Z·(ZᵀB) (4·out·ρ·r), (ZᵀB)·A (2·in·ρ·r). The rate is
measured before and after each run of devec, and the larger one counts: that of a shared machine
drifts."""
SPACE = 3.5  # inputs, and outputs of twice their size
GEMM_LIMIT = 2.0
MEMORY_LIMIT = 600_000_000


def tall_flops(rows: int, columns: int, rank: int, k: int, shared: int) -> int:
    """Floating-point operations of the tall products that one module needs in factor space.

    For each of k adapters: the Gram matrices AAᵀ and BᵀB (2·in·r² and 2·out·r²), an orthonormal
    basis U = B·R⁻¹ (2·out·r²), the overlap U_iᵀU_{i+1} with the next adapter, the first after the
    last (2·out·r²), ZᵀB and Z·(ZᵀB) (2·out·ρ·r each), (ZᵀB)·A for the common vector (2·in·ρ·r).
    Products of r × r matrices are left out.

    Args:
        rows: out.
        columns: in.
        rank: r.
        k: Number of adapters.
        shared: ρ, the shared rank.

    Returns:
        The number, a multiplication and an addition counted as two.
    """
    grams = 2 * columns * rank**2 + 2 * rows * rank**2
    basis = 2 * rows * rank**2
    overlap = 2 * rows * rank**2
    split = 4 * rows * shared * rank
    common = 2 * columns * shared * rank
    return k * (grams + basis + overlap + split + common)


def total_flops(job: Job, timed: Timed) -> int:
    """Operations of `tall_flops` over all modules, with the shared ranks that were found."""
    ranks = [timed.shared.get(name, timed.shared.get(_bare(name), -1)) for name in job.shapes]
    if min(ranks) < 0:
        raise RuntimeError(f"devec reported no shared ranks of some modules of {job.title}")
    return sum(
        tall_flops(rows, columns, job.rank, job.k, shared)
        for (rows, columns), shared in zip(job.shapes.values(), ranks, strict=True)
    )


def _bare(name: str) -> str:
    """A module's name in the model, without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


def gemm_rate(widths: list[int], rank: int, dtype: torch.dtype, repeats: int) -> float:
    """Floating-point operations a second of tall products (n × r)·(r × r), from median times."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    square = drawn(rank, rank)
    tall = {n: drawn(n, rank) for n in widths}
    times = rivals({n: partial(torch.matmul, B, square) for n, B in tall.items()}, repeats)
    medians = [sorted(found)[len(found) // 2] for found in times.values()]
    return sum(2 * n * rank**2 for n in widths) / sum(medians)


def gemm_table(job: Job, timed: Timed, double: float) -> Table:
    """The time without start-up beside the products alone, the memory beside one module."""
    flops = total_flops(job, timed)
    multiples = [own * rate / flops for own, rate in zip(timed.own(), timed.rates, strict=True)]
    single = median(timed.rates)
    row = {
        "products": flops,
        "rate, float32": single,
        "rate, float64": double,
        "time of products": flops / single,
        "devec without start-up": timed.without_start_up()["devec"],
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
            Bar(memory, timed.peak(), limit, "bytes"),
        ],
    )


def section(settings: Settings) -> Section:
    """Eight adapters of all linear layers of LLaMA-2-7B, rank 256."""
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
    timed = measure(job, settings, start, settings.times(3), single)
    return Section(title, TEXT, [*tables([(job, timed)], []), gemm_table(job, timed, double())])
