"""How long `devec decompose` takes from files to files, beside reading and writing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.jobs import COMPARED, Job, Timed, measure
from benchmarks.pools import flux_shapes, sd15_shapes, sdxl_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import start_up

TEXT = """\
`python -m devec decompose … --out DIR` as a whole process, with its default options, timed from
outside; memory is the peak of its resident memory, pages of mapped files included. The floor is a
process that loads every input with safetensors' `load_file` and saves as many tensors to as many
files of the same sizes with `save_file`, with and without an `fsync` of each, which devec does
before it renames its outputs. Outputs of the last run are removed and the disk is synced before
each run; inputs are in the page cache as far as it holds them. Adapters are bfloat16 and share a
quarter of their directions. Factors are random, of condition numbers near 1; where that of B is
1000, bases are computed in float64. How long the floor takes depends on how fast the disk takes
what is written, more so than how long devec takes, which computes meanwhile: where the disk drifts,
as that of a shared machine does, so does the ratio, and a bar met in one run may be missed in
another."""
OWN = """\
Without start-up: of devec, whole processes less the median of `python -c 'import devec;
devec.decompose'`; of the floor, the time of loading and saving, taken inside of it."""


class Wanted(NamedTuple):
    """A job, and what its figures should reach."""

    job: Job
    bars: Callable[[Timed], list[Bar]]


def floor_bars(title: str, limit: float) -> Callable[[Timed], list[Bar]]:
    """Bars against the floor without fsync, with and without start-up."""

    def bars(timed: Timed) -> list[Bar]:
        rows = {"whole processes": timed.whole(), "without start-up": timed.without_start_up()}
        return [
            Bar(f"{title}, devec / floor, {what}", row["devec / floor"], limit, "times")
            for what, row in rows.items()
        ]

    return bars


def second_bars(title: str, limit: float) -> Callable[[Timed], list[Bar]]:
    """A bar of seconds, start-up included."""

    def bars(timed: Timed) -> list[Bar]:
        return [Bar(f"{title}, start-up included", timed.whole()["devec"], limit, "seconds")]

    return bars


def wanted(settings: Settings) -> list[Wanted]:
    """All jobs; a small one if that will do."""
    if settings.quick:
        job = Job("Flux, tiny", flux_shapes(32, 1, 1), k=2, rank=4)
        return [Wanted(job, floor_bars(job.title, 2.0))]
    sd15 = Job("Stable Diffusion 1.5, UNet and text encoder, k = 2", sd15_shapes(), k=2)
    sdxl = Job("SDXL, UNet, k = 2", sdxl_shapes(), k=2)
    flux = Job("Flux, k = 8", flux_shapes(), k=8)
    hard = Job("Flux, k = 8, B of condition 1000", flux_shapes(), k=8, condition=1000.0)
    return [
        Wanted(sd15, lambda _: []),
        Wanted(sdxl, second_bars(sdxl.title, 4.0)),
        Wanted(flux, floor_bars(flux.title, 2.0)),
        Wanted(hard, lambda _: []),
    ]


def tables(jobs: list[tuple[Job, Timed]], bars: list[Bar]) -> list[Table]:
    """What there is to say of jobs from files to files.

    Args:
        jobs: The jobs and their runs.
        bars: What their figures should reach.

    Returns:
        Whole processes, and the same without start-up.
    """
    common = {"job": "", "modules": "count", "rank": "count", "read": "bytes", "written": "bytes"}
    start = jobs[0][1].start_up
    return [
        Table(
            "Whole processes",
            {**common, **COMPARED, "memory of devec": "bytes"},
            [
                {
                    "job": job.title,
                    "modules": len(job.shapes),
                    "rank": job.rank,
                    "read": timed.read,
                    "written": sum(timed.sizes),
                    "memory of devec": timed.peak(),
                    **timed.whole(),
                }
                for job, timed in jobs
            ],
            bars,
        ),
        Table(
            "Without start-up",
            {"job": "", **COMPARED, "start-up": "seconds"},
            [
                {"job": job.title, **timed.without_start_up(), "start-up": start}
                for job, timed in jobs
            ],
            notes=[OWN],
        ),
    ]


def section(settings: Settings) -> Section:
    """Adapters of diffusion models."""
    start = start_up(settings.threads, settings.times(5))
    jobs, bars = [], []
    for job, bars_of in wanted(settings):
        timed = measure(job, settings, start, settings.times(5))
        jobs.append((job, timed))
        bars += bars_of(timed)
    return Section("Decompose, from files to files", TEXT, tables(jobs, bars))
