"""What is to be written of an adapter, known before its modules are read or computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, OutputError, listed, located
from devec.files.safetensors_writer import TensorWriter
from devec.lazy import outlines

_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Modules of an adapter that are stored together.

    Attributes:
        name: What to call them in messages.
        modules: Names of the modules, of which the adapter may lack some.
        tensors: From the deltas of those that it has to the stored tensors, by key; from outlines
            to outlines.
    """

    name: str
    modules: tuple[str, ...]
    tensors: Callable[[Mapping[str, Delta]], dict[str, Tensor]]

    def stored(self, modules: Mapping[str, Delta]) -> dict[str, Tensor]:
        """The stored tensors of the modules among those of an adapter."""
        with located(f"module {self.name!r}"):
            return self.tensors({name: modules[name] for name in self.modules if name in modules})


@dataclass(frozen=True)
class FilePlan:
    """A file of tensors, or a directory with one, that is to be written.

    Attributes:
        modules: The modules of the adapter.
        pieces: What is stored of them.
        whole: Tensors that are stored as they are, by key.
        strings: The header's strings, from the digest of the data.
        hashed: Whether they need that digest.
        file: Name of the file in its directory; empty if there is none.
        beside: Writes what else the directory holds.
    """

    modules: Mapping[str, Delta]
    pieces: Sequence[Piece]
    whole: Mapping[str, Tensor]
    strings: Callable[[str], Mapping[str, str]]
    hashed: bool = False
    file: str = ""
    beside: Callable[[Path], None] | None = None

    def known(self) -> dict[str, Tensor]:
        """Outlines of all tensors.

        Returns:
            Key → outline.

        Raises:
            IncompatibleError: If two pieces have a key in common.
            OutputError: If there is nothing to write.
        """
        known: dict[str, Tensor] = {}
        for piece in self.pieces:
            stored = self.outlines_of(piece)
            if stored.keys() & known.keys():
                raise IncompatibleError(
                    f"module {piece.name!r}: another module is written under the same keys"
                )
            known |= stored
        known |= outlines(self.whole)
        if not known:
            raise OutputError("the adapter changes no module; there is nothing to write")
        return known

    def outlines_of(self, piece: Piece) -> dict[str, Tensor]:
        """Outlines of the tensors of a piece, by key."""
        known = outlines(self.modules)
        return piece.stored({name: known[name].outline for name in piece.modules if name in known})

    def open(self, path: Path, *, create: bool = True) -> Output:
        """The output in the making.

        Args:
            path: The file or directory.
            create: Whether it is made; otherwise another process has made it.

        Returns:
            The output, nothing written yet.
        """
        return Output(self, path, create=create)

    def write(self, path: Path) -> None:
        """Write all of it, one piece after the other.

        Args:
            path: The file or directory to make.
        """
        output = self.open(path)
        try:
            for piece in self.pieces:
                output.write(piece, self.modules)
            output.finish()
        finally:
            output.close()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as they are stored, in memory of their own."""
        stored: dict[str, Tensor] = {}
        for piece in self.pieces:
            stored |= {k: t.clone() for k, t in piece.stored(self.modules).items()}
        return {**stored, **self.whole}


class Output:
    """An output in the making, to which pieces are written in any order, from any process."""

    def __init__(self, plan: FilePlan, path: Path, *, create: bool) -> None:
        """Make the file as large as it will be."""
        self.plan, self._path = plan, path
        known = plan.known()
        if plan.file and create:
            path.mkdir()
        file = path / plan.file if plan.file else path
        self._writer = TensorWriter(file, known, plan.strings(_NO_DIGEST), create=create)

    def write(self, piece: Piece, modules: Mapping[str, Delta]) -> None:
        """Write a piece of the plan.

        Args:
            piece: The piece.
            modules: The modules, of an adapter with the outlines that were planned for.
        """
        for key, tensor in piece.stored(modules).items():
            self._writer.put(key, tensor)

    def flush(self) -> None:
        """Bring what has been written to the disk."""
        self._writer.flush()

    def written_elsewhere(self, piece: Piece) -> None:
        """Take note that another process has written a piece."""
        self._writer.mark_written(self.plan.outlines_of(piece).keys())

    def finish(self) -> None:
        """Write what is stored as it is, the digest, and what stands beside the file."""
        plan = self.plan
        for key in plan.whole:
            self._writer.put(key, plan.whole[key])
        digest = self._writer.data_sha256() if plan.hashed else _NO_DIGEST
        self._writer.finish(plan.strings(digest))
        if plan.beside is not None:
            plan.beside(self._path)

    def close(self) -> None:
        """Let go of the file, complete or not."""
        self._writer.close()


Places = Mapping[str, tuple[tuple[int, int], tuple[int, ...]]]  # module → shape and kernel


def require_places(shapes: Mapping[str, tuple[int, int]], modules: Mapping[str, Delta]) -> None:
    """Refuse modules that a layout has no place for: they would be lost.

    Args:
        shapes: Module → shape (out, in) of the weight it has a place for.
        modules: The modules to be written.

    Raises:
        IncompatibleError: If there are such modules.
    """
    lost = [module for module, delta in modules.items() if shapes.get(module) != delta.shape]
    if lost:
        raise IncompatibleError(
            f"the layout has no place for the modules {listed(lost)}; it is that of an adapter "
            "without them, or of another base model"
        )


def spread(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel, where one of a single point is none: that is a linear layer."""
    return kernel if any(size != 1 for size in kernel) else ()


def usual_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The most frequent type; float32 if there is none."""
    counts = Counter(dtypes).most_common(1)
    return counts[0][0] if counts else torch.float32
