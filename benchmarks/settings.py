"""How a benchmark is to be run."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How a benchmark is to be run.

    Attributes:
        folder: Where files are generated, in folders that are removed again; the system's
            temporary directory if None.
        quick: Tiny sizes, which show that a benchmark works and measure nothing.
        repeats: How often everything is measured; as each section sees fit if None.
        threads: Threads of torch, here and in processes that are started.
    """

    folder: Path | None = None
    quick: bool = False
    repeats: int | None = None
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def times(self, usual: int) -> int:
        """How often to measure what is measured `usual` times unless told otherwise."""
        return self.repeats or (1 if self.quick else usual)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A new folder, which is removed at the end of a ``with`` statement."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="devec-benchmark-", dir=self.folder)
