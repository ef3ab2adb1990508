"""Read and write files without computing: a lower bound for the time of a program on files.

    python -m benchmarks.floor --out DIR --sizes N,N,... [--fsync] INPUT...

Every input is loaded with safetensors' `load_file`. Then one file for each size is written with
`save_file`, filled with that many bytes of the loaded tensors.
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
    """Name → tensor, up to a total number of bytes.

    The tensors are repeated as copies if there are too few of them, and the last one is cut.
    """
    chosen: dict[str, Tensor] = {}
    seen: set[int] = set()
    for tensor in cycle(tensors):
        part = tensor if tensor.nbytes <= size else tensor.flatten()[: size // tensor.itemsize]
        if not part.nbytes:
            return chosen
        is_first = part is tensor and id(tensor) not in seen
        chosen[f"tensor{len(chosen)}"] = part if is_first else part.clone()
        seen.add(id(tensor))
        size -= part.nbytes
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, and print the times of both in seconds as JSON."""
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
        first = index // 2 % len(loaded)  # two outputs per adapter, as in `devec decompose`
        tensors = [t for file in loaded[first:] + loaded[:first] for t in file.values()]
        path = options.out / f"{index}.safetensors"
        save_file(payload(tensors, size), path)
        if options.fsync:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    print(json.dumps({"load": load, "save": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
