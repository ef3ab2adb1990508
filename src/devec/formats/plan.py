"""Plans of outputs: what a file will contain, before modules are read or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from devec.adapters.layout import Piece
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, OutputError
from devec.files.safetensors_writer import TensorWriter
from devec.lazy import outlines

_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file to write, alone or in a directory.

    Attributes:
        modules: The modules of the adapter.
        pieces: The pieces that they are stored in.
        whole: Key → tensor that is stored unchanged.
        strings: Digest of the data → strings of the header.
        hashed: Whether the strings depend on the digest.
        file: Name of the file in its directory; empty if the output is a single file.
        beside: Writes the other files of the directory.
    """

    modules: Mapping[str, Delta]
    pieces: Sequence[Piece]
    whole: Mapping[str, Tensor]
    strings: Callable[[str], Mapping[str, str]]
    hashed: bool = False
    file: str = ""
    beside: Callable[[Path], None] | None = None

    def outlines(self) -> dict[str, Tensor]:
        """Key → outline of every tensor; refused if there is none, or if pieces share a key."""
        every: dict[str, Tensor] = {}
        for piece in self.pieces:
            stored = self.outlines_of(piece)
            if stored.keys() & every.keys():
                raise IncompatibleError(
                    f"module {piece.name!r}: another module is written under the same keys"
                )
            every |= stored
        every |= outlines(self.whole)
        if not every:
            raise OutputError("the adapter changes no module; there is nothing to write")
        return every

    def outlines_of(self, piece: Piece) -> dict[str, Tensor]:
        """Key → outline of the tensors of a piece."""
        known = outlines(self.modules)
        return piece.stored({name: known[name].outline for name in piece.modules if name in known})

    def open(self, path: Path, *, create: bool = True) -> FileOutput:
        """Open the output that this or another process creates."""
        return FileOutput(self, path, create=create)

    def write(self, path: Path) -> None:
        """Write the whole output, piece by piece."""
        output = self.open(path)
        try:
            for piece in self.pieces:
                output.write(piece, self.modules)
            output.finish()
        finally:
            output.close()

    def tensors(self) -> dict[str, Tensor]:
        """Key → tensor of the whole output, in memory of its own."""
        stored: dict[str, Tensor] = {}
        for piece in self.pieces:
            stored |= {k: t.clone() for k, t in piece.stored(self.modules).items()}
        return {**stored, **self.whole}


class FileOutput:
    """An unfinished file, to which pieces are written in any order and from any process."""

    def __init__(self, plan: FilePlan, path: Path, *, create: bool) -> None:
        """Create the file in its final size, or open it."""
        self.plan, self._path = plan, path
        tensors = plan.outlines()
        if plan.file and create:
            path.mkdir()
        file = path / plan.file if plan.file else path
        self._writer = TensorWriter(file, tensors, plan.strings(_NO_DIGEST), create=create)

    def write(self, piece: Piece, modules: Mapping[str, Delta]) -> None:
        """Write a piece, from modules with the outlines of the plan."""
        for key, tensor in piece.stored(modules).items():
            self._writer.put(key, tensor)

    def flush(self) -> None:
        """Write buffered data to the disk."""
        self._writer.flush()

    def written_elsewhere(self, piece: Piece) -> None:
        """Record that another process has written a piece."""
        self._writer.mark_written(self.plan.outlines_of(piece).keys())

    def finish(self) -> None:
        """Write the unchanged tensors, the header's strings, and the other files."""
        plan = self.plan
        for key in plan.whole:
            self._writer.put(key, plan.whole[key])
        digest = self._writer.data_sha256() if plan.hashed else _NO_DIGEST
        self._writer.finish(plan.strings(digest))
        if plan.beside is not None:
            plan.beside(self._path)

    def close(self) -> None:
        """Close the file, whether or not it is complete."""
        self._writer.close()
