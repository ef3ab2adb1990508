"""Where the time of `devec decompose` goes: its stages, and the functions that it spends it in."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.pools import flux_shapes, llama_shapes, write_pool
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from devec import Adapter
from devec.files.staging import Staging
from devec.streaming.decompose_to import decompose_to
from devec.streaming.job import Job

TEXT = """\
`decompose_to` in this process, libraries loaded and inputs in the page cache. Stages are those of a
run with all threads. Functions are those of a run with one thread, with the time spent in each of
them itself, so that what threads cost one another (the interpreter's lock, memory) is left out.

What was tried, compared by hand, and kept: stacks of modules that stay in the cache; tall products
in float32; digests while libraries load; flushing beside the work; factors of a pool read once
while they take less than 16 MB; memory of large tensors used again, since new memory is made page
by page; what has been written of large tensors let go from the system's cache, which otherwise
takes new memory, too; sums in 16 bits to find what is not finite; two stacks at a time, however
many cores there are. Not kept, as they made no difference or cost memory: larger stacks, huge
pages, one arena of the allocator, other switch intervals of the interpreter, holding all factors.
Slower: smaller stacks; one worker with all threads inside of BLAS, where small operations wait for
each other. Faster, as the interpreter's lock is not shared: a process for each core instead of a
thread; but forking a process that has threads is not sound, and starting one takes longer than that
gains."""
LONGEST = 12


def timed(times: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that adds its seconds to a table."""

    def run(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - start

    return run


def stages(sources: list[Path], out: Path) -> dict[str, float]:
    """Seconds of each stage, and of all cores together in the longest of them."""
    times: dict[str, float] = {}
    read = timed(times, "read headers, digest", Adapter.from_pretrained)
    pool = [read(source, lazy=True) for source in sources]
    cpu = time.process_time()
    with (
        patch.object(Job, "begin", timed(times, "plan outputs", Job.begin)),
        patch.object(Job, "share", timed(times, "read, split and write", Job.share)),
        patch.object(Job, "_complete", timed(times, "complete", Job._complete)),
        patch.object(Staging, "commit", timed(times, "flush and rename", Staging.commit)),
    ):
        decompose_to(out, pool)
    times["all of it after reading, sum over cores"] = time.process_time() - cpu
    return times


def functions(sources: list[Path], out: Path) -> list[dict[str, Any]]:
    """The functions with the most time of their own, in a run with one thread."""
    pool = [Adapter.from_pretrained(source, lazy=True) for source in sources]
    profile = cProfile.Profile()
    with patch("devec.decomposition.engine.in_parallel", lambda call, work: map(call, work)):
        profile.enable()
        decompose_to(out, pool)
        profile.disable()
    stats = pstats.Stats(profile)
    rows = [
        {"function": f"`{Path(file).name}: {name}`", "calls": calls[1], "time": calls[2]}
        for (file, _, name), calls in stats.stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(rows, key=lambda row: -row["time"])[:LONGEST]


def section(settings: Settings) -> Section:
    """Stages and functions of the Flux job, and functions of a part of the LLaMA job."""
    torch.set_num_threads(settings.threads)
    flux = flux_shapes(32, 1, 1) if settings.quick else flux_shapes()
    llama = llama_shapes(1, 32, 64) if settings.quick else llama_shapes(2)
    rank = 4 if settings.quick else 256
    with settings.scratch() as folder:
        sources = write_pool(Path(folder) / "flux", 2 if settings.quick else 8, flux)
        found = stages(sources, Path(folder) / "out")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        small = functions(sources, Path(folder) / "again")
        sources = write_pool(Path(folder) / "llama", 8, llama, rank, peft=True)
        large = functions(sources, Path(folder) / "large")
        torch.set_num_threads(threads)
    columns = {"function": "", "calls": "count", "time": "seconds"}
    stage_rows = [{"stage": name, "time": value} for name, value in found.items()]
    return Section(
        "Where the time goes",
        TEXT,
        [
            Table("Stages, Flux, k = 8", {"stage": "", "time": "seconds"}, stage_rows),
            Table("Functions, Flux, k = 8", columns, small),
            Table("Functions, two layers of LLaMA-2-7B, r = 256, k = 8", columns, large),
        ],
    )
