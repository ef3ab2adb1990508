"""Run ``devec decompose`` with one of its measures for speed or memory switched off.

python -m benchmarks.without MEASURE SOURCE... --out DIR
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from unittest.mock import patch

from devec import cli

DIGESTS = "digests begin while libraries load"

# Measure → the names, in modules of devec, that are replaced to switch it off.
MEASURES: dict[str, dict[str, object]] = {
    "memory of large tensors is reused": {"streaming.job.reuse_memory": nullcontext},
    "free memory is returned between outputs": {"streaming.job.return_memory": lambda: None},
    "objects of libraries are frozen": {},
    DIGESTS: {},
    "outputs are flushed while they are written": {"streaming.job.flushing": nullcontext},
    "written pages leave the cache": {"files.safetensors_writer.uncache": lambda *_: None},
    "factors below 16 MB are read once": {"decomposition.stacks.stack._KEPT_BYTES": 0},
    "half of a wide Gram matrix is computed": {"linalg.batched._STRIP": 1 << 30},
    "two stacks at a time": {"decomposition.cpu_workers._MOST_WORKERS": 1},
    "modules of one shape in batches": {"decomposition.stacks.build._MOST_MODULES": 1},
}


def main(measure: str, *arguments: str) -> None:
    """Run the command without the measure; with all of them if it is none."""
    command = importlib.import_module("devec.cli.decompose")  # the package has a function of it
    begin = command.begin_reading

    def begin_without(sources: Sequence[str]) -> None:
        if measure != DIGESTS:
            begin(sources)
        if measure == "objects of libraries are frozen":
            patch.object(gc, "freeze").start()
        for name, value in MEASURES.get(measure, {}).items():  # only now are libraries loaded
            module, _, attribute = name.rpartition(".")
            patch.object(importlib.import_module(f"devec.{module}"), attribute, value).start()

    patch.object(command, "begin_reading", begin_without).start()
    sys.argv = ["devec", "decompose", *arguments]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
