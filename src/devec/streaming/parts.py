"""Parts of a decomposition on their way to files: written where they go, or put by.

Several processes may take up one part. What each of them has done is `Taken`; the first process
gathers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Output, Plan
from devec.decomposition.scopes import nothing_of
from devec.deltas.delta import Delta
from devec.deltas.sums import base_of
from devec.lazy import Lazy, outlines
from devec.streaming.spool import Spool, Spooled, from_spools


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
