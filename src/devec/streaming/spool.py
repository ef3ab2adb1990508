"""Deltas put by on the disk until all of an adapter is known: its ranks, or whether it is zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.files.random_access import OpenFile, Place, bytes_of
from devec.lazy import Lazy


class Spooled(NamedTuple):
    """A delta in a spool.

    Attributes:
        outline: What is known of it, without its base weight.
        places: Where its tensors are.
    """

    outline: Delta
    places: list[Place]


class Spool:
    """A file of deltas, which any thread may add to.

    Args:
        path: The file, which is made.
    """

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self.path = path
        self.held: dict[str, Spooled] = {}
        self._file = path.open("wb")
        self._lock = Lock()

    def put(self, name: str, delta: Delta) -> None:
        """Put a delta by.

        Args:
            name: Its name.
            delta: The delta, on the CPU.
        """
        places: list[Place] = []

        def write(tensor: Tensor) -> Tensor:
            places.append(Place(self._file.tell(), tuple(tensor.shape), tensor.dtype))
            self._file.write(bytes_of(tensor))
            return tensor.to("meta")

        with self._lock:
            outline = delta.each(write)
        self.held[name] = Spooled(outline.on(_NO_BASE), places)

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


class _NoBase:
    """In the place of a base weight, which does not go to the disk."""

    source = ""

    def read(self, *_: object) -> Tensor:
        raise LookupError("a spooled delta was not given its base weight")


_NO_BASE = _NoBase()


def from_spools(
    spools: Iterable[tuple[Path, Mapping[str, Spooled]]], bases: Mapping[str, BaseWeight]
) -> Lazy[Delta]:
    """The deltas in spools.

    Args:
        spools: The files, complete, with what they hold.
        bases: Name → base weight, of those that need one.

    Returns:
        Name → delta, read from the disk when it is asked for.
    """
    homes: dict[str, tuple[OpenFile, Spooled]] = {}
    for path, held in spools:
        if held:
            file = OpenFile(path)
            homes.update({name: (file, spooled) for name, spooled in held.items()})

    def based(name: str, delta: Delta) -> Delta:
        return delta.on(bases[name]) if delta.gain is not None else delta

    def read(name: str) -> Delta:
        file, spooled = homes[name]
        places = iter(spooled.places)
        return based(name, spooled.outline.each(lambda _: file.read(next(places))))

    return Lazy({name: based(name, s.outline) for name, (_, s) in homes.items()}, read)
