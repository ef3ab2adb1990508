"""Times of calls and of whole processes, one beside the other."""

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
Found = TypeVar("Found")


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """The call that makes another one and returns its wall time in seconds."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that does not count where it is repeated."""
    if repeats > 1:
        call()
    return statistics.median(clocked(call)() for _ in range(repeats))


def in_turn(calls: Mapping[Key, Callable[[], Found]], repeats: int) -> dict[Key, list[Found]]:
    """What calls return that are made in turn, A B A B, so that all meet the same machine."""
    found: dict[Key, list[Found]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(call())
    return found


def rivals(calls: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, list[float]]:
    """Wall times of calls made in turn, each after one that does not count."""
    for call in calls.values():
        call()
    return in_turn({name: clocked(call) for name, call in calls.items()}, repeats)


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Median of the ratios of times taken in turn, pair by pair."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


@dataclass(frozen=True)
class Run:
    """A process that ran to its end.

    Attributes:
        seconds: Wall time, from outside.
        peak: Peak of its resident memory in bytes, pages of mapped files included.
        output: What it printed.
    """

    seconds: float
    peak: int
    output: str


def python(*arguments: str | Path, threads: int) -> Run:
    """Run this Python in a process of its own, from its start to its end.

    Args:
        *arguments: Arguments of the interpreter.
        threads: Threads that torch is to use.

    Returns:
        What was measured.

    Raises:
        RuntimeError: If the process fails; with all that it wrote to stderr.
    """
    return process(sys.executable, *map(str, arguments), threads=threads)


def process(*command: str, threads: int) -> Run:
    """Run a program, given by its path, as `python` does."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        launched = subprocess.run(
            [sys.executable, "-S", str(LAUNCH), str(report), *command],
            env=environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    if found.get("code") != 0:
        raise RuntimeError(
            f"{shlex.join(command)}\nfailed with exit code {found.get('code')}:\n{launched.stderr}"
        )
    return Run(found["seconds"], found["peak"], launched.stdout)


def environment(threads: int) -> dict[str, str]:
    """Variables of processes that are measured: no network, so many threads."""
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
    """Median time that Python takes to import what `devec.decompose` needs, and to end."""
    command = ("-c", "import devec; devec.decompose")
    return statistics.median(python(*command, threads=threads).seconds for _ in range(repeats))
