"""Decompositions from files to files as whole processes, and the floor of reading and writing."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from os import sync
from pathlib import Path

from benchmarks.pools import RANK, Shapes, tensor_bytes, tensor_files, write_pool
from benchmarks.results import Row
from benchmarks.settings import Settings
from benchmarks.timing import Run, in_turn, python, ratio

FLOORS = {"floor": (), "floor, fsync": ("--fsync",)}  # name → options of benchmarks.floor


@dataclass(frozen=True)
class Job:
    """A pool to decompose.

    Attributes:
        title: The name of the job in tables.
        shapes: Module → shape.
        k: Number of adapters.
        rank: Rank of every module.
        peft: Whether the adapters are PEFT directories; single files of diffusers otherwise.
        condition: Approximate condition number of B; 1 for that of a random matrix.
    """

    title: str
    shapes: Shapes
    k: int
    rank: int = RANK
    peft: bool = False
    condition: float = 1.0

    def factor_bytes(self, module: str) -> int:
        """Size in bytes of the factors of one module of one adapter, in bfloat16."""
        rows, *columns = self.shapes[module]
        return 2 * self.rank * (rows + prod(columns))

    def input_bytes(self) -> int:
        """Size in bytes of the factors of all adapters."""
        return self.k * sum(map(self.factor_bytes, self.shapes))


@dataclass(frozen=True)
class Files:
    """The adapters of a job on the disk, and the folder of the outputs.

    Attributes:
        sources: Files or directories of the adapters.
        out: Folder of the outputs; it does not exist before a run.
        threads: Number of threads of torch.
    """

    sources: Sequence[Path]
    out: Path
    threads: int

    def clear(self) -> None:
        """Remove the outputs of the last run, and wait until all writes have reached the disk."""
        if self.out.exists():
            shutil.rmtree(self.out)
        sync()

    def devec(self, *options: str | Path, k: int | None = None) -> Run:
        """Run ``devec decompose`` on all adapters, or on the first `k`."""
        self.clear()
        arguments: list[str | Path] = [*self.sources[:k], "--out", self.out, *options]
        return python("-m", "devec", "decompose", *arguments, threads=self.threads)

    def floor(self, sizes: Sequence[int], *options: str) -> Run:
        """Run the floor: read all adapters, and write files of these sizes."""
        self.clear()
        inputs = [file for source in self.sources for file in tensor_files(source)]
        arguments: list[str | Path] = [
            "--out",
            self.out,
            "--sizes",
            ",".join(map(str, sizes)),
            *options,
            *inputs,
        ]
        return python("-m", "benchmarks.floor", *arguments, threads=self.threads)


@contextmanager
def written(job: Job, settings: Settings) -> Iterator[Files]:
    """Write the adapters of a job; the files are removed at the end of the context."""
    with settings.scratch() as folder:
        pool = Path(folder, "pool")
        sources = write_pool(
            pool, job.k, job.shapes, job.rank, peft=job.peft, condition=job.condition
        )
        yield Files(sources, Path(folder, "out"), settings.threads)


@dataclass(frozen=True)
class JobRuns:
    """All runs of one job.

    Attributes:
        devec: Runs of devec.
        floors: Name of a floor → its runs.
        start_up: Median time in seconds of starting Python and importing what devec needs.
        read: Bytes of tensors in the inputs.
        sizes: Bytes of tensors in each output.
        shared: Module → shared rank.
        rates: For each run of devec, the larger of the machine's rates before and after it.
    """

    devec: Sequence[Run]
    floors: Mapping[str, Sequence[Run]]
    start_up: float
    read: int
    sizes: Sequence[int]
    shared: Mapping[str, int]
    rates: Sequence[float] = ()

    def own_times(self) -> list[float]:
        """Times of devec in seconds without start-up."""
        return [run.seconds - self.start_up for run in self.devec]

    def peak(self) -> float:
        """Median peak memory of devec in bytes."""
        return statistics.median(run.peak for run in self.devec)

    def whole(self) -> Row:
        """Median times of whole processes, and ratios to the floors."""
        floors = {name: [run.seconds for run in runs] for name, runs in self.floors.items()}
        return _compared([run.seconds for run in self.devec], floors)

    def without_start_up(self) -> Row:
        """Median times without start-up, for the floors of loading and saving, and ratios."""
        floors = {name: list(map(transfer_time, runs)) for name, runs in self.floors.items()}
        return _compared(self.own_times(), floors)


def _compared(devec: Sequence[float], floors: Mapping[str, Sequence[float]]) -> Row:
    """Median times, and medians of the pairwise ratios."""
    medians = {name: statistics.median(times) for name, times in floors.items()}
    ratios = {f"devec / {name}": ratio(devec, times) for name, times in floors.items()}
    return {"devec": statistics.median(devec), **medians, **ratios}


COMPARED = {
    "devec": "seconds",
    **dict.fromkeys(FLOORS, "seconds"),
    **{f"devec / {name}": "times" for name in FLOORS},
}  # column of these rows → unit


def transfer_time(floor: Run) -> float:
    """Time in seconds of loading and saving in a run of the floor, without start-up."""
    times = json.loads(floor.output)
    return float(times["load"] + times["save"])


def measure(
    job: Job,
    settings: Settings,
    start_up: float,
    repeats: int,
    rate: Callable[[], float] | None = None,
) -> JobRuns:
    """Run a job and its floors in turn.

    Args:
        job: The job.
        settings: Settings of the benchmarks.
        start_up: Median time of start-up in seconds.
        repeats: Number of rounds, after a warm-up run of devec.
        rate: Measures a rate of the machine, before and after each run of devec.

    Returns:
        All runs.
    """
    with written(job, settings) as files:
        report = files.out.with_name("report.json")
        files.devec("--json", report)
        shared = {
            module["module"]: module["shared_rank"]
            for module in json.loads(report.read_text(encoding="utf-8"))["modules"]
        }
        sizes = [tensor_bytes(path) for path in tensor_files(files.out)]
        floors = {name: partial(files.floor, sizes, *options) for name, options in FLOORS.items()}
        calls: dict[str, Callable[[], Run]] = {"devec": files.devec, **floors}
        rates: list[float] = []
        if rate is not None:
            calls["devec"] = partial(_run_between_rates, files, rate, rates)
        runs = in_turn(calls, repeats)
        read = sum(tensor_bytes(f) for source in files.sources for f in tensor_files(source))
    return JobRuns(runs.pop("devec"), runs, start_up, read, sizes, shared, rates)


def _run_between_rates(files: Files, rate: Callable[[], float], rates: list[float]) -> Run:
    """Run devec between two measurements of a rate, and append the larger to `rates`."""
    files.clear()
    before = rate()
    run = files.devec()
    rates.append(max(before, rate()))
    return run
