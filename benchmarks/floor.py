"""Read and write files and do nothing else: what no program on files can be faster than.

    python -m benchmarks.floor --out DIR --sizes N,N,... [--fsync] INPUT...

Every input is loaded with safetensors' `load_file`. Then as many files as there are sizes are
written with its `save_file`, each with so many bytes of the tensors that were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def payload(tensors: Iterable[Tensor], size: int) -> dict[str, Tensor]:
    """Tensors, one after the other, up to a number of bytes; the last one is cut.

    Args:
        tensors: At least one; they are taken again, as copies, if there are too few.
        size: Number of bytes.

    Returns:
        Name → tensor; less than one number of a tensor may be missing.
    """
    taken: dict[str, Tensor] = {}
    seen: set[int] = set()
    for tensor in cycle(tensors):
        part = tensor if tensor.nbytes <= size else tensor.flatten()[: size // tensor.itemsize]
        if not part.nbytes:
            return taken
        whole = part is tensor and id(tensor) not in seen
        taken[f"tensor{len(taken)}"] = part if whole else part.clone()
        seen.add(id(tensor))
        size -= part.nbytes
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, and print the seconds of both as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor")
    parser.add_argument("inputs", nargs="+", type=Path, help="safetensors files to read")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--sizes", required=True, help="bytes of tensors in each output")
    parser.add_argument("--fsync", action="store_true", help="flush every output to the disk")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    loaded = [load_file(path) for path in options.inputs]
    load = time.perf_counter() - start
    start = time.perf_counter()
    options.out.mkdir()
    for index, size in enumerate(map(int, options.sizes.split(","))):
        first = index // 2 % len(loaded)  # two outputs an adapter, as `devec decompose` has them
        tensors = [t for file in loaded[first:] + loaded[:first] for t in file.values()]
        path = options.out / f"{index}.safetensors"
        save_file(payload(tensors, size), path)
        if options.fsync:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    print(json.dumps({"load": load, "save": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
