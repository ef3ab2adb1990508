"""Growth of time and memory of `devec decompose` with the number of adapters, ranks, modules."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.jobs import Job, written
from benchmarks.pools import Shapes, flux_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Run, in_turn, start_up

TEXT = """\
`python -m devec decompose` as a whole process on evenly spaced modules of Flux, bfloat16. The runs
of one table are made in turn. Without start-up: minus the median time of `python -c 'import devec;
devec.decompose'`.

Libraries take most of the memory (see Start-up). Two things grow with the number of adapters: the
metadata of each adapter (names, shapes, offsets in files), and the factors that are read only once,
up to a limit of 16 MB per thread, which the largest pool exceeds. Large tensors reuse memory that
earlier ones have freed, so little is lost to fragmentation."""
LINEAR, FLAT = 0.15, 0.10
UNITS = {"time": "seconds", "without start-up": "seconds", "memory": "bytes"}

Runs = Mapping[int, Sequence[Run]]


def some_modules(shapes: Shapes, count: int) -> Shapes:
    """A number of evenly spaced modules."""
    names = list(shapes)
    return {name: shapes[name] for name in (names[i * len(names) // count] for i in range(count))}


def deviation(times: Mapping[int, float]) -> float:
    """The largest relative deviation of times from a least-squares fit a + b·k."""
    k = torch.tensor([[1.0, float(k)] for k in times], dtype=torch.float64)
    t = torch.tensor(list(times.values()), dtype=torch.float64)
    fitted = k @ torch.linalg.lstsq(k, t[:, None]).solution
    return float((t / fitted[:, 0] - 1).abs().max())


def table(title: str, column: str, runs: Runs, start: float, bars: Sequence[Bar] = ()) -> Table:
    """The table of median time and memory for each size."""
    rows = []
    for size, of_size in runs.items():
        time = statistics.median(run.seconds for run in of_size)
        memory = statistics.median(run.peak for run in of_size)
        rows.append(
            {column: size, "time": time, "without start-up": time - start, "memory": memory}
        )
    return Table(title, {column: "count", **UNITS}, rows, bars)


def adapter_bars(runs: Runs, start: float) -> list[Bar]:
    """Time linear in the number of adapters, and constant memory."""
    times = {k: statistics.median(run.seconds for run in of_k) for k, of_k in runs.items()}
    peaks = [statistics.median(run.peak for run in of_k) for of_k in runs.values()]
    own = {k: time - start for k, time in times.items()}
    label = "largest deviation from a + b·k"
    return [
        Bar(f"time, {label}", deviation(times), LINEAR, "percent"),
        Bar(f"time without start-up, {label}", deviation(own), LINEAR, "percent"),
        Bar("memory, largest / smallest - 1", max(peaks) / min(peaks) - 1, FLAT, "percent"),
    ]


def measured(jobs: Mapping[int, Job], settings: Settings) -> dict[int, list[Run]]:
    """Size → runs of its job, made in turn with those of the other sizes."""
    with ExitStack() as stack:
        calls: dict[int, Callable[[], Run]] = {
            size: stack.enter_context(written(job, settings)).devec for size, job in jobs.items()
        }
        return in_turn(calls, settings.times(3))


def by_adapters(shapes: Shapes, ks: Sequence[int], settings: Settings) -> dict[int, list[Run]]:
    """Number of adapters → runs on the first adapters of one pool, made in turn."""
    with written(Job("adapters", shapes, k=max(ks)), settings) as files:
        calls: dict[int, Callable[[], Run]] = {k: partial(files.devec, k=k) for k in ks}
        return in_turn(calls, settings.times(5))


class Sizes(NamedTuple):
    """The sizes that are measured.

    Attributes:
        flux: All modules.
        fixed: Number of modules in the tables of adapters and ranks.
        adapters: Numbers of adapters.
        ranks: Ranks.
        modules: Numbers of modules.
    """

    flux: Shapes
    fixed: int
    adapters: Sequence[int]
    ranks: Sequence[int]
    modules: Sequence[int]


def section(settings: Settings) -> Section:
    """Measure all three tables."""
    sizes = Sizes(
        flux_shapes(), 100, (2, 4, 8, 16, 32), (4, 8, 16, 32, 64, 128, 256), (50, 100, 200, 494)
    )
    if settings.quick:
        sizes = Sizes(flux_shapes(32), 2, (2, 3, 4), (4,), (2,))
    fixed = some_modules(sizes.flux, sizes.fixed)
    start = start_up(settings.threads, settings.times(5))
    adapters = by_adapters(fixed, sizes.adapters, settings)
    ranks = {r: Job("ranks", fixed, k=2, rank=r) for r in sizes.ranks}
    modules = {n: Job("modules", some_modules(sizes.flux, n), k=2) for n in sizes.modules}
    bars = adapter_bars(adapters, start)
    tables = [
        table(f"Adapters ({len(fixed)} modules, rank 16)", "adapters", adapters, start, bars),
        table(f"Rank ({len(fixed)} modules, k = 2)", "rank", measured(ranks, settings), start),
        table("Modules (rank 16, k = 2)", "modules", measured(modules, settings), start),
    ]
    return Section("Scaling", TEXT, tables)
