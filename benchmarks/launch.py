"""Run a command, and write its time and peak memory to a file.

    python -S launch.py REPORT COMMAND...

On Linux the peak of a command starts at the memory of the process that launches it. Therefore
`benchmarks.timing.process` launches commands through this small program.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(report: str, *command: str) -> None:
    """Run a command; report seconds, peak resident memory in bytes, and exit code as JSON."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "peak": 1024 * usage.ru_maxrss,
        "code": os.waitstatus_to_exitcode(status),
    }
    Path(report).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
