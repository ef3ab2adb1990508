"""Time and memory of starting devec."""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import in_turn, python

TEXT = "Whole processes, run in turn."
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "devec --help": ("-m", "devec", "--help"),
    "python -c 'import devec'": ("-c", "import devec"),
    "python -c 'import torch'": ("-c", "import torch"),
    "python -c 'import devec; devec.decompose'": ("-c", "import devec; devec.decompose"),
}


def section(settings: Settings) -> Section:
    """Measure processes that only start."""
    calls = {
        name: partial(python, *command, threads=settings.threads)
        for name, command in COMMANDS.items()
    }
    in_turn(calls, 0 if settings.quick else 1)
    rows = [
        {
            "process": f"`{name}`",
            "time": statistics.median(run.seconds for run in runs),
            "memory": statistics.median(run.peak for run in runs),
        }
        for name, runs in in_turn(calls, settings.times(7)).items()
    ]
    return Section(
        "Start-up",
        TEXT,
        [Table("Processes", {"process": "", "time": "seconds", "memory": "bytes"}, rows)],
    )
