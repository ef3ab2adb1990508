"""Times of calls and of whole processes, measured in turn where they are compared."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "benchmarks" / "launch.py"

Key = TypeVar("Key")
Result = TypeVar("Result")


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """A function that makes a call and returns its wall time in seconds."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in seconds, after a warm-up call if it is repeated."""
    if repeats > 1:
        call()
    return statistics.median(clocked(call)() for _ in range(repeats))


def in_turn(calls: Mapping[Key, Callable[[], Result]], repeats: int) -> dict[Key, list[Result]]:
    """The results of calls made in turn, A B A B, under the same conditions of the machine."""
    results: dict[Key, list[Result]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results


def times_in_turn(
    calls: Mapping[Key, Callable[[], object]], repeats: int
) -> dict[Key, list[float]]:
    """Wall times in seconds of calls made in turn, after a warm-up call of each."""
    for call in calls.values():
        call()
    return in_turn({name: clocked(call) for name, call in calls.items()}, repeats)


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the pairwise ratios of times measured in turn."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


@dataclass(frozen=True)
class Run:
    """A completed process.

    Attributes:
        seconds: Wall time, measured from outside.
        peak: Peak resident memory in bytes, including pages of mapped files.
        output: The standard output.
    """

    seconds: float
    peak: int
    output: str


def python(*arguments: str | Path, threads: int) -> Run:
    """Run the current interpreter with arguments in a process; errors include its stderr."""
    return process(sys.executable, *map(str, arguments), threads=threads)


def process(*command: str, threads: int) -> Run:
    """Run a program, given by its path, in a process; errors include its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        launched = subprocess.run(
            [sys.executable, "-S", str(LAUNCH), str(report), *command],
            env=environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        usage = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    if usage.get("code") != 0:
        raise RuntimeError(
            f"{shlex.join(command)}\nfailed with exit code {usage.get('code')}:\n{launched.stderr}"
        )
    return Run(usage["seconds"], usage["peak"], launched.stdout)


def environment(threads: int) -> dict[str, str]:
    """The environment of measured processes: no network, and a fixed number of threads."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def start_up(threads: int, repeats: int) -> float:
    """Median time in seconds of a Python process that imports what `devec.decompose` needs."""
    command = ("-c", "import devec; devec.decompose")
    return statistics.median(python(*command, threads=threads).seconds for _ in range(repeats))
