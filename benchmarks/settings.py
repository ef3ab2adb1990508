"""Settings that all benchmarks share."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        folder: Folder for generated files, which are removed after use; the system's temporary
            directory if None.
        quick: Whether to use tiny sizes, to check that the benchmark runs.
        repeats: Number of measurements; each section has its own default.
        threads: Number of threads of torch, also in child processes.
    """

    folder: Path | None = None
    quick: bool = False
    repeats: int | None = None
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def times(self, usual: int) -> int:
        """The number of measurements for a figure that is measured `usual` times by default."""
        return self.repeats or (1 if self.quick else usual)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A new temporary folder, to be used in a ``with`` statement."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="devec-benchmark-", dir=self.folder)
