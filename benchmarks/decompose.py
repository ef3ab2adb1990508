"""Time of `devec decompose` from files to files, compared with reading and writing alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.jobs import COMPARED, Job, JobRuns, measure
from benchmarks.pools import flux_shapes, sd15_shapes, sdxl_shapes
from benchmarks.results import Bar, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import start_up

TEXT = """\
`python -m devec decompose … --out DIR` as a whole process with its default options, timed from
outside. Memory is the peak resident memory, including pages of mapped files. The floor is a process
that loads every input with safetensors' `load_file` and saves the same number of files of the same
sizes with `save_file`, with and without an `fsync` of each; devec calls `fsync` before it renames
its outputs. Before each run, outputs of the last run are removed and the disk is synced; inputs are
in the page cache as far as they fit. Adapters are bfloat16 and share a quarter of their directions.
Factors are random, with condition numbers near 1; where B has condition number 1000, bases are
computed in float64. The time of the floor depends on the speed of the disk more than the time of
devec, which computes while it writes. If the speed of the disk varies, as on a shared machine, so
does the ratio, and a bar that is met in one run may be missed in another."""
START_UP = """\
Without start-up: for devec, the time of the whole process minus the median time of `python -c
'import devec; devec.decompose'`; for the floor, the time of loading and saving, measured inside the
process."""


class JobWithBars(NamedTuple):
    """A job, and the bars that its figures should meet."""

    job: Job
    bars: Callable[[JobRuns], list[Bar]]


def floor_bars(title: str, limit: float) -> Callable[[JobRuns], list[Bar]]:
    """Bars relative to the floor without fsync, with and without start-up."""

    def bars(runs: JobRuns) -> list[Bar]:
        rows = {"whole processes": runs.whole(), "without start-up": runs.without_start_up()}
        return [
            Bar(f"{title}, devec / floor, {what}", row["devec / floor"], limit, "times")
            for what, row in rows.items()
        ]

    return bars


def second_bars(title: str, limit: float) -> Callable[[JobRuns], list[Bar]]:
    """A bar in seconds, with start-up."""

    def bars(runs: JobRuns) -> list[Bar]:
        return [Bar(f"{title}, start-up included", runs.whole()["devec"], limit, "seconds")]

    return bars


def jobs_with_bars(settings: Settings) -> list[JobWithBars]:
    """All jobs, or one tiny job for a quick run."""
    if settings.quick:
        job = Job("Flux, tiny", flux_shapes(32, 1, 1), k=2, rank=4)
        return [JobWithBars(job, floor_bars(job.title, 2.0))]
    sd15 = Job("Stable Diffusion 1.5, UNet and text encoder, k = 2", sd15_shapes(), k=2)
    sdxl = Job("SDXL, UNet, k = 2", sdxl_shapes(), k=2)
    flux = Job("Flux, k = 8", flux_shapes(), k=8)
    hard = Job("Flux, k = 8, B of condition 1000", flux_shapes(), k=8, condition=1000.0)
    return [
        JobWithBars(sd15, lambda _: []),
        JobWithBars(sdxl, second_bars(sdxl.title, 4.0)),
        JobWithBars(flux, floor_bars(flux.title, 2.0)),
        JobWithBars(hard, lambda _: []),
    ]


def tables(jobs: list[tuple[Job, JobRuns]], bars: list[Bar]) -> list[Table]:
    """The tables of jobs from files to files: whole processes, and without start-up."""
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
                    "read": runs.read,
                    "written": sum(runs.sizes),
                    "memory of devec": runs.peak(),
                    **runs.whole(),
                }
                for job, runs in jobs
            ],
            bars,
        ),
        Table(
            "Without start-up",
            {"job": "", **COMPARED, "start-up": "seconds"},
            [
                {"job": job.title, **runs.without_start_up(), "start-up": start}
                for job, runs in jobs
            ],
            notes=[START_UP],
        ),
    ]


def section(settings: Settings) -> Section:
    """Measure adapters of diffusion models."""
    start = start_up(settings.threads, settings.times(5))
    jobs, bars = [], []
    for job, bars_of in jobs_with_bars(settings):
        runs = measure(job, settings, start, settings.times(5))
        jobs.append((job, runs))
        bars += bars_of(runs)
    return Section("Decompose, from files to files", TEXT, tables(jobs, bars))
