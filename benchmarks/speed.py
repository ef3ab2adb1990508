"""Time of decompositions in memory.

    python -m benchmarks.speed

The pools have the 494 modules of a Flux LoRA, or one module of 4096 × 4096 and more adapters.

The pool of many modules is measured first. In a process that has not freed memory yet, the
allocator returns each temporary of half a megabyte to the system at once, which costs page faults;
a process that has read an adapter is not in that state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.pools import RANK, flux_shapes, in_memory
from benchmarks.results import Row, Section, Table, render_section
from benchmarks.settings import Settings
from benchmarks.timing import seconds, times_in_turn
from devec import decompose

TEXT = "`devec.decompose` of adapters in memory, rank 16, float32; no files are read or written."
KS = (2, 4, 8, 16)


def of_flux(settings: Settings) -> Iterator[Row]:
    """Measure pools with all modules of a Flux LoRA."""
    shapes = flux_shapes(32, 1, 1) if settings.quick else flux_shapes()
    for k in KS[:2]:
        adapters = in_memory(k, shapes)
        time = seconds(partial(decompose, adapters), settings.times(3))
        yield {"what": f"{len(shapes)} modules of Flux", "adapters": k, "chain": time}


def of_one_module(settings: Settings) -> Iterator[Row]:
    """Measure pools with one module, with the methods in turn."""
    n = 64 if settings.quick else 4096
    for k in KS[:1] if settings.quick else KS:
        adapters = in_memory(k, {"module": (n, n)})
        times = times_in_turn(
            {m: partial(decompose, adapters, method=m) for m in ("chain", "mean")},
            settings.times(201),
        )
        medians = {method: sorted(of_one)[len(of_one) // 2] for method, of_one in times.items()}
        yield {"what": f"one module {n} × {n}", "adapters": k, **medians}


def section(settings: Settings) -> Section:
    """Measure all pools."""
    torch.set_num_threads(settings.threads)
    units = {"what": "", "adapters": "count", "chain": "seconds", "mean": "seconds"}
    rows = [*of_flux(settings), *of_one_module(settings)]
    return Section("Decompose, in memory", TEXT, [Table(f"Rank {RANK}", units, rows)])


if __name__ == "__main__":
    print(render_section(section(Settings())))
