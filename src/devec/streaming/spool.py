"""Spools: temporary files of deltas, for parts whose size is known in the end only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.files.random_access import OpenFile, TensorSpan, bytes_of
from devec.lazy import LazyMapping


class Spooled(NamedTuple):
    """A delta in a spool.

    Attributes:
        outline: Its shapes and types, without its base weight.
        spans: Offsets, shapes and types of its tensors in the file.
    """

    outline: Delta
    spans: list[TensorSpan]


class Spool:
    """A file to which any thread may append deltas.

    Args:
        path: The file, which is created.
    """

    def __init__(self, path: Path) -> None:
        """Create the file."""
        self.path = path
        self.contents: dict[str, Spooled] = {}
        self._file = path.open("wb")
        self._lock = Lock()

    def append(self, name: str, delta: Delta) -> None:
        """Append a delta, which is on the CPU."""
        spans: list[TensorSpan] = []

        def write(tensor: Tensor) -> Tensor:
            spans.append(TensorSpan(self._file.tell(), tuple(tensor.shape), tensor.dtype))
            self._file.write(bytes_of(tensor))
            return tensor.to("meta")

        with self._lock:
            outline = delta.each(write)
        self.contents[name] = Spooled(outline.on(_NO_BASE), spans)

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


class _NoBase:
    """Stands for a base weight, which is not written to a spool."""

    source = ""

    def read(self, *_: object) -> Tensor:
        raise LookupError("a spooled delta was not given its base weight")


_NO_BASE = _NoBase()


def read_spools(
    spools: Iterable[tuple[Path, Mapping[str, Spooled]]], bases: Mapping[str, BaseWeight]
) -> LazyMapping[Delta]:
    """The deltas of several spools, read on access.

    Args:
        spools: Complete files and their contents.
        bases: Module → base weight, for the deltas that need one.
    """
    homes: dict[str, tuple[OpenFile, Spooled]] = {}
    for path, contents in spools:
        if contents:
            file = OpenFile(path)
            homes.update({name: (file, spooled) for name, spooled in contents.items()})

    def based(name: str, delta: Delta) -> Delta:
        return delta.on(bases[name]) if delta.gain is not None else delta

    def read(name: str) -> Delta:
        file, spooled = homes[name]
        spans = iter(spooled.spans)
        return based(name, spooled.outline.each(lambda _: file.read(next(spans))))

    return LazyMapping({name: based(name, s.outline) for name, (_, s) in homes.items()}, read)
