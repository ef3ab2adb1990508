"""Decompositions from files to files: whole processes, beside reading and writing alone."""

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

FLOORS = {"floor": (), "floor, fsync": ("--fsync",)}  # name → options


@dataclass(frozen=True)
class Job:
    """What to decompose.

    Attributes:
        title: What it is called.
        shapes: Module → shape.
        k: Number of adapters.
        rank: Rank of every module.
        peft: Whether the adapters are PEFT's directories; single files of diffusers otherwise.
        condition: About the condition number of B; 1 for that of random matrices.
    """

    title: str
    shapes: Shapes
    k: int
    rank: int = RANK
    peft: bool = False
    condition: float = 1.0

    def factor_bytes(self, module: str) -> int:
        """Size of the factors of one module of one adapter, in bfloat16."""
        rows, *columns = self.shapes[module]
        return 2 * self.rank * (rows + prod(columns))

    def input_bytes(self) -> int:
        """Size of the factors of all adapters."""
        return self.k * sum(map(self.factor_bytes, self.shapes))


@dataclass(frozen=True)
class Files:
    """Adapters on the disk and a place for what is made of them.

    Attributes:
        sources: The adapters, files or directories.
        out: Where results go; there is nothing before a run.
        threads: Threads of torch.
    """

    sources: Sequence[Path]
    out: Path
    threads: int

    def clear(self) -> None:
        """Remove the results of the last run, and let the disk come to rest."""
        if self.out.exists():
            shutil.rmtree(self.out)
        sync()

    def devec(self, *options: str | Path, k: int | None = None) -> Run:
        """Run ``devec decompose`` on all adapters, or on the first k."""
        self.clear()
        arguments: list[str | Path] = [*self.sources[:k], "--out", self.out, *options]
        return python("-m", "devec", "decompose", *arguments, threads=self.threads)

    def floor(self, sizes: Sequence[int], *options: str) -> Run:
        """Read all adapters and write tensors of these sizes, and do nothing else."""
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
    """The adapters of a job as files, as long as the context lasts."""
    with settings.scratch() as folder:
        pool = Path(folder, "pool")
        sources = write_pool(
            pool, job.k, job.shapes, job.rank, peft=job.peft, condition=job.condition
        )
        yield Files(sources, Path(folder, "out"), settings.threads)


@dataclass(frozen=True)
class Timed:
    """All runs of one job.

    Attributes:
        devec: Runs of devec.
        floors: Runs of the floors, by name.
        start_up: Median time to start, of Python with all that devec imports.
        read: Bytes of tensors in the inputs.
        sizes: Bytes of tensors in every output.
        shared: Module → shared rank.
        rates: What was found around each run of devec, the larger of before and after.
    """

    devec: Sequence[Run]
    floors: Mapping[str, Sequence[Run]]
    start_up: float
    read: int
    sizes: Sequence[int]
    shared: Mapping[str, int]
    rates: Sequence[float] = ()

    def own(self) -> list[float]:
        """Seconds of devec less its start-up."""
        return [run.seconds - self.start_up for run in self.devec]

    def peak(self) -> float:
        """Median peak of devec's memory in bytes."""
        return statistics.median(run.peak for run in self.devec)

    def whole(self) -> Row:
        """Medians and ratios to the floors of whole processes."""
        floors = {name: [run.seconds for run in runs] for name, runs in self.floors.items()}
        return _compared([run.seconds for run in self.devec], floors)

    def without_start_up(self) -> Row:
        """The same of devec less its start-up, and of the floors' loading and saving alone."""
        floors = {name: list(map(alone, runs)) for name, runs in self.floors.items()}
        return _compared(self.own(), floors)


def _compared(devec: Sequence[float], floors: Mapping[str, Sequence[float]]) -> Row:
    """Medians, and medians of ratios."""
    medians = {name: statistics.median(times) for name, times in floors.items()}
    ratios = {f"devec / {name}": ratio(devec, times) for name, times in floors.items()}
    return {"devec": statistics.median(devec), **medians, **ratios}


COMPARED = {
    "devec": "seconds",
    **dict.fromkeys(FLOORS, "seconds"),
    **{f"devec / {name}": "times" for name in FLOORS},
}  # columns of such rows → units


def alone(floor: Run) -> float:
    """Seconds that a floor needed to load and save, without start-up."""
    found = json.loads(floor.output)
    return float(found["load"] + found["save"])


def measure(
    job: Job,
    settings: Settings,
    start_up: float,
    repeats: int,
    rate: Callable[[], float] | None = None,
) -> Timed:
    """Run a job, and its floors beside it.

    Args:
        job: What to decompose.
        settings: How to run.
        start_up: Median time to start.
        repeats: How often, after one run of devec that does not count.
        rate: A rate of the machine, found before and after each run of devec.

    Returns:
        All runs.
    """
    with written(job, settings) as files:
        report = files.out.with_name("report.json")
        files.devec("--json", report)
        shared = {
            found["module"]: found["shared_rank"]
            for found in json.loads(report.read_text(encoding="utf-8"))["modules"]
        }
        sizes = [tensor_bytes(path) for path in tensor_files(files.out)]
        floors = {name: partial(files.floor, sizes, *options) for name, options in FLOORS.items()}
        calls: dict[str, Callable[[], Run]] = {"devec": files.devec, **floors}
        rates: list[float] = []
        if rate is not None:
            calls["devec"] = partial(_rated, files, rate, rates)
        runs = in_turn(calls, repeats)
        read = sum(tensor_bytes(f) for source in files.sources for f in tensor_files(source))
    return Timed(runs.pop("devec"), runs, start_up, read, sizes, shared, rates)


def _rated(files: Files, rate: Callable[[], float], rates: list[float]) -> Run:
    """A run of devec between two findings of a rate, of which the larger is added to others."""
    files.clear()
    before = rate()
    run = files.devec()
    rates.append(max(before, rate()))
    return run
