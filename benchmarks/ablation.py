"""What each measure for speed or memory gains: `devec decompose` with and without it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.jobs import Files, Job, written
from benchmarks.pools import flux_shapes, llama_shapes
from benchmarks.results import Row, Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Run, in_turn, python, ratio
from benchmarks.without import MEASURES

TEXT = """\
`devec decompose` from files to files as a whole process, with one measure switched off at a time
(`python -m benchmarks.without MEASURE …`). All variants run in turn, so that each round meets the
same machine. Time and memory are relative to the run of the same round with all measures: the
median of the ratios, with the smallest and the largest. Above 1 the measure is a gain."""
ALL = "all measures"


def without(files: Files, measure: str) -> Run:
    """Run without a measure."""
    files.clear()
    arguments = [*map(str, files.sources), "--out", str(files.out)]
    return python("-m", "benchmarks.without", measure, *arguments, threads=files.threads)


def row(measure: str, runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """Ratios of the runs without a measure to those with all."""
    times, of_all = [run.seconds for run in runs], [run.seconds for run in full]
    peaks, peaks_of_all = [run.peak for run in runs], [run.peak for run in full]
    each = [time / other for time, other in zip(times, of_all, strict=True)]
    return {
        "without": measure,
        "median": statistics.median(times),
        "time": ratio(times, of_all),
        "smallest": min(each),
        "largest": max(each),
        "memory": ratio(peaks, peaks_of_all),
    }


def table(job: Job, measures: Sequence[str], settings: Settings) -> Table:
    """All measures on one job."""
    repeats = settings.times(7)
    with written(job, settings) as files:
        calls: dict[str, Callable[[], Run]] = {
            name: partial(without, files, name) for name in (ALL, *measures)
        }
        without(files, ALL)  # inputs into the page cache
        runs = in_turn(calls, repeats)
    full = runs.pop(ALL)
    time = statistics.median(run.seconds for run in full)
    peak = statistics.median(run.peak for run in full)
    units = {"without": "", "median": "seconds"}
    units |= dict.fromkeys(("time", "smallest", "largest", "memory"), "times")
    note = f"With all measures: {time:.2f} s, {peak / 1e6:.0f} MB, {repeats} rounds."
    rows = [row(name, of_one, full) for name, of_one in runs.items()]
    return Table(job.title, units, rows, notes=[note])


def section(settings: Settings) -> Section:
    """Small factors of many modules, and large ones of few."""
    flux = Job("Flux, k = 8", flux_shapes(), k=8)
    llama = Job("Two layers of LLaMA-2-7B, r = 256, k = 8", llama_shapes(2), 8, 256, peft=True)
    if settings.quick:
        flux = Job("Flux, tiny", flux_shapes(32, 1, 1), k=2, rank=4)
        llama = Job("LLaMA, tiny", llama_shapes(1, 32, 64), k=2, rank=8, peft=True)
    measures = list(MEASURES)[: 1 if settings.quick else None]
    tables = [table(job, measures, settings) for job in (flux, llama)]
    return Section("What each measure gains", TEXT, tables)
