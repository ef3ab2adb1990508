"""How fast devec is in memory.

    python -m benchmarks.speed

The 494 modules that a Flux LoRA adapts, and one module of 4096 × 4096 in pools of more adapters.

The pool of many modules comes first. In a process that has freed nothing yet, the allocator gives
every temporary of half a megabyte back to the system at once and pays for it in page faults; no
process that has read an adapter is in that state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.pools import RANK, flux_shapes, in_memory
from benchmarks.results import Row, Section, Table, render_section
from benchmarks.settings import Settings
from benchmarks.timing import rivals, seconds
from devec import decompose

TEXT = "`devec.decompose` of adapters in memory, rank 16, float32; nothing is read or written."
KS = (2, 4, 8, 16)


def of_flux(settings: Settings) -> Iterator[Row]:
    """All modules of a Flux LoRA."""
    shapes = flux_shapes(32, 1, 1) if settings.quick else flux_shapes()
    for k in KS[:2]:
        adapters = in_memory(k, shapes)
        time = seconds(partial(decompose, adapters), settings.times(3))
        yield {"what": f"{len(shapes)} modules of Flux", "adapters": k, "chain": time}


def of_one_module(settings: Settings) -> Iterator[Row]:
    """One module, with the methods in turn."""
    n = 64 if settings.quick else 4096
    for k in KS[:1] if settings.quick else KS:
        adapters = in_memory(k, {"module": (n, n)})
        times = rivals(
            {m: partial(decompose, adapters, method=m) for m in ("chain", "mean")},
            settings.times(201),
        )
        medians = {method: sorted(found)[len(found) // 2] for method, found in times.items()}
        yield {"what": f"one module {n} × {n}", "adapters": k, **medians}


def section(settings: Settings) -> Section:
    """Times in memory."""
    torch.set_num_threads(settings.threads)
    units = {"what": "", "adapters": "count", "chain": "seconds", "mean": "seconds"}
    rows = [*of_flux(settings), *of_one_module(settings)]
    return Section("Decompose, in memory", TEXT, [Table(f"Rank {RANK}", units, rows)])


if __name__ == "__main__":
    print(render_section(section(Settings())))
