"""Run a command; write down how long it took and the peak of its memory.

    python -S launch.py REPORT COMMAND...

Linux begins to count the peak of a command at the memory of the process that starts it, so this
program, which is small, starts what `benchmarks.timing.process` measures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(report: str, *command: str) -> None:
    """Run the command to its end.

    Args:
        report: File to write to: seconds, peak of the resident memory in bytes, exit code.
        *command: Path of a program, and its arguments.
    """
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "peak": 1024 * usage.ru_maxrss,
        "code": os.waitstatus_to_exitcode(status),
    }
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
