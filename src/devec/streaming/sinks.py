"""Sinks of parts on the disk: output files, written in place as modules come, and spools.

Several processes may write one part. Each of them reports what it has accepted, and the first
process gathers the reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Event, Thread

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Output, Plan
from devec.decomposition.result import zero_part
from devec.deltas.delta import Delta
from devec.deltas.sums import first_base_weight
from devec.lazy import LazyMapping, outlines
from devec.streaming.spool import Spool, Spooled, read_spools

# Seconds between flushing one file and the next.
_PAUSE = 0.02


@dataclass(frozen=True)
class Accepted:
    """What one process has accepted of a part.

    Attributes:
        zeros: Modules in which the part is zero.
        written: Modules that were written to the output.
        spool: The spool file, if there is one.
        contents: The contents of the spool.
    """

    zeros: set[str]
    written: set[str] = field(default_factory=set)
    spool: Path | None = None
    contents: Mapping[str, Spooled] = field(default_factory=dict)


class FileSink:
    """A part whose shapes are known beforehand: modules are written to the output as they come.

    Args:
        adapter: The outline of the part.
        plan: The plan of its output.
        path: Path of the unfinished output.
        create: Whether this process creates the output.
    """

    def __init__(self, adapter: Adapter, plan: Plan, path: Path, *, create: bool) -> None:
        """Open the output."""
        self.adapter = adapter
        self._output: Output = plan.open(path, create=create)
        self._pieces = {piece.modules[0]: piece for piece in plan.pieces}
        self._written: set[str] = set()
        self._zeros: set[str] = set()
        self._flushed = 0  # number of modules written before the last flush

    def accept(self, deltas: Mapping[str, Delta | None]) -> None:
        """Write some modules; zeros wait until it is known that the part is not zero."""
        for module, delta in deltas.items():
            if delta is None:
                self._zeros.add(module)
            else:
                self._write(module, delta)

    def flush(self) -> None:
        """Flush the output to the disk if modules were written since the last time."""
        if len(self._written) > self._flushed:
            self._flushed = len(self._written)
            self._output.flush()

    def accepted(self) -> Accepted:
        """What this process has accepted."""
        return Accepted(self._zeros, written=self._written)

    def gather(self, reports: Sequence[Accepted]) -> None:
        """Take over what all processes have accepted."""
        self._zeros = set().union(*(report.zeros for report in reports))
        for module in set().union(*(report.written for report in reports)) - self._written:
            self._output.written_elsewhere(self._pieces[module])

    def complete(self, originals: Mapping[str, Delta]) -> None:
        """Write the zeros, too, and finish the output."""
        for module in self._zeros:
            self._write(module, zero_part(originals[module]))
        self._output.finish()

    def close(self) -> None:
        """Close the output."""
        self._output.close()

    def _write(self, module: str, delta: Delta) -> None:
        """Write one module."""
        self._output.write(self._pieces[module], {module: delta})
        self._written.add(module)


class SpoolSink:
    """A part whose ranks or zeros are known in the end only: modules are spooled.

    Args:
        path: The spool file of this process.
    """

    def __init__(self, path: Path) -> None:
        """Create the spool."""
        self._spool = Spool(path)
        self._zeros: set[str] = set()
        self._reports: Sequence[Accepted] = ()

    def accept(self, deltas: Mapping[str, Delta | None]) -> None:
        """Spool some modules."""
        for module, delta in deltas.items():
            if delta is None:
                self._zeros.add(module)
            else:
                self._spool.append(module, delta)

    def accepted(self) -> Accepted:
        """What this process has accepted; its spool is complete then."""
        self._spool.close()
        return Accepted(self._zeros, spool=self._spool.path, contents=self._spool.contents)

    def gather(self, reports: Sequence[Accepted]) -> None:
        """Take over what all processes have accepted."""
        self._zeros = set().union(*(report.zeros for report in reports))
        self._reports = reports

    def modules(self, originals: Mapping[str, Delta], order: Sequence[str]) -> LazyMapping[Delta]:
        """The modules in order, read on access.

        Args:
            originals: Module → delta, from which zeros are made; empty if zeros are left out.
            order: The order of modules.
        """
        gains = {m: d for m, d in outlines(originals).items() if d.gain is not None}
        bases = {module: first_base_weight([delta]) for module, delta in gains.items()}
        spools = [(one.spool, one.contents) for one in self._reports if one.spool is not None]
        spooled = read_spools(spools, {m: base for m, base in bases.items() if base is not None})
        zeros = {
            m: zero_part(outlines(originals)[m]).outline for m in self._zeros & originals.keys()
        }
        known = {**spooled.outlines, **zeros}

        def read(module: str) -> Delta:
            return spooled[module] if module in spooled else zero_part(originals[module])

        return LazyMapping({module: known[module] for module in order if module in known}, read)

    def close(self) -> None:
        """Close the spool."""
        self._spool.close()


@contextmanager
def flushing(sinks: Sequence[FileSink]) -> Iterator[None]:
    """Flush outputs to the disk while they are written, so that little is left for the end."""
    done = Event()
    failed: list[OSError] = []

    def flush() -> None:
        for sink in cycle(sinks):
            try:
                sink.flush()
            except OSError as error:  # the system reports it once, to whoever flushes first
                failed.append(error)
                return
            if done.wait(_PAUSE):
                return

    thread = Thread(target=flush, name="devec-flush", daemon=True)
    if sinks:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if sinks:
            thread.join()
    if failed:
        raise failed[0]
