"""Parts of a decomposition on their way to files: written where they go, or put by.

Several processes may take up one part. What each of them has done is `Taken`; the first process
gathers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple, Protocol

from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Output, Plan
from devec.decomposition.scopes import nothing_of
from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.sums import base_of
from devec.files.random_access import OpenFile, TensorSpan, bytes_of
from devec.lazy import Lazy, outlines

# Seconds between one file and the next that is brought to the disk.
_PAUSE = 0.02


@dataclass(frozen=True)
class Taken:
    """What a process has done of a part: zeros, modules written, or where they are put by."""

    zeros: set[str]
    done: set[str] = field(default_factory=set)
    path: Path | None = None
    held: Mapping[str, Spooled] = field(default_factory=dict)


class Direct:
    """A part that is written piece by piece, as it comes.

    Args:
        adapter: The part, of which the outline is known.
        plan: What is written of it.
        path: Where it is made.
        create: Whether this process makes it.
    """

    def __init__(self, adapter: Adapter, plan: Plan, path: Path, *, create: bool) -> None:
        """Open the output."""
        self.adapter, self.path = adapter, path
        self._output: Output = plan.open(path, create=create)
        self._pieces = {piece.modules[0]: piece for piece in plan.pieces}
        self.done: set[str] = set()
        self.zeros: set[str] = set()
        self._flushed = 0  # how many modules had been written when it was flushed last

    def take(self, deltas: Mapping[str, Delta | None]) -> None:
        """Write some modules; zeros are left until it is known that there is anything else."""
        for module, delta in deltas.items():
            if delta is None:
                self.zeros.add(module)
            else:
                self._write(module, delta)

    def flush(self) -> None:
        """Bring what has been written to the disk, if it has not been yet."""
        if len(self.done) > self._flushed:
            self._flushed = len(self.done)
            self._output.flush()

    def taken(self) -> Taken:
        """What this process has done."""
        return Taken(self.zeros, done=self.done)

    def gather(self, taken: Sequence[Taken]) -> None:
        """Take note of what all processes have done."""
        self.zeros = set().union(*(one.zeros for one in taken))
        for module in set().union(*(one.done for one in taken)) - self.done:
            self._output.written_elsewhere(self._pieces[module])

    def complete(self, originals: Mapping[str, Delta]) -> None:
        """Write the zeros, too, and finish."""
        for module in self.zeros:
            self._write(module, nothing_of(originals[module]))
        self._output.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._output.close()

    def _write(self, module: str, delta: Delta) -> None:
        self._output.write(self._pieces[module], {module: delta})
        self.done.add(module)


class PutBy:
    """A part that is put by until all of it is known.

    Args:
        path: Where this process puts it by.
    """

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self._spool = Spool(path)
        self.zeros: set[str] = set()
        self._all: Sequence[Taken] = ()

    def take(self, deltas: Mapping[str, Delta | None]) -> None:
        """Put some modules by."""
        for module, delta in deltas.items():
            if delta is None:
                self.zeros.add(module)
            else:
                self._spool.put(module, delta)

    def taken(self) -> Taken:
        """What this process has put by."""
        self._spool.close()
        return Taken(self.zeros, path=self._spool.path, held=self._spool.held)

    def gather(self, taken: Sequence[Taken]) -> None:
        """Take note of what all processes have put by."""
        self.zeros = set().union(*(one.zeros for one in taken))
        self._all = taken

    def modules(self, originals: Mapping[str, Delta], order: Sequence[str]) -> Mapping[str, Delta]:
        """The part's modules.

        Args:
            originals: What modules in which it is zero are the zeros of; none of the others.
            order: The order of modules.

        Returns:
            Module → delta, read when it is asked for.
        """
        gains = {m: d for m, d in outlines(originals).items() if d.gain is not None}
        bases = {module: base_of([delta]) for module, delta in gains.items()}
        spools = [(one.path, one.held) for one in self._all if one.path is not None]
        held = from_spools(spools, {m: base for m, base in bases.items() if base is not None})
        zeros = {
            m: nothing_of(outlines(originals)[m]).outline for m in self.zeros & originals.keys()
        }
        known = {**held.outlines, **zeros}

        def read(module: str) -> Delta:
            return held[module] if module in held else nothing_of(originals[module])

        return Lazy({module: known[module] for module in order if module in known}, read)

    def close(self) -> None:
        """Let go of the file."""
        self._spool.close()


class Spooled(NamedTuple):
    """A delta in a spool.

    Attributes:
        outline: What is known of it, without its base weight.
        places: Where its tensors are.
    """

    outline: Delta
    places: list[TensorSpan]


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
        places: list[TensorSpan] = []

        def write(tensor: Tensor) -> Tensor:
            places.append(TensorSpan(self._file.tell(), tuple(tensor.shape), tensor.dtype))
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


@contextmanager
def flushing(parts: Sequence[Flushed]) -> Iterator[None]:
    """Bring parts to the disk while they are being written, so that little is left for the end.

    Args:
        parts: The parts.

    Yields:
        Nothing.
    """
    done = Event()
    failed: list[OSError] = []

    def flush() -> None:
        for part in cycle(parts):
            try:
                part.flush()
            except OSError as error:  # the system says it once, and to whom asks first
                failed.append(error)
                return
            if done.wait(_PAUSE):
                return

    thread = Thread(target=flush, name="devec-flush", daemon=True)
    if parts:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if parts:
            thread.join()
    if failed:
        raise failed[0]


class Flushed(Protocol):
    """What is being written to a file."""

    def flush(self) -> None:
        """Bring what has been written to the disk."""
