"""What adapters and file formats know of each other: readers and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter
    from devec.deltas.delta import Delta

# A LoHa of rank 16 and a LoKr of factor 8 and rank 32 are still exact with this many columns, which
# are as many as a large LoRA has.
MAX_RANK = 256


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        max_rank: Largest rank of the factors that a LoHa or LoKr is rewritten to; what has a larger
            one is truncated, and its error stated.
        allow_pickle: Whether pickled state dicts may be read.
        base: The base model whose weights DoRAs need: a path, the id of a repository, or a model.
            Nothing of it is read before a weight is needed.
    """

    max_rank: int = MAX_RANK
    allow_pickle: bool = False
    base: object | None = None


Reader = Callable[[Path, str, ReadOptions], "Adapter | None"]

# Formats stand above adapters, so their readers are named here and imported on first use; in order
# of precedence. A reader returns None for files that are not of its format.
_READERS = ("devec.formats.peft.read", "devec.formats.single_file.read")


def readers() -> list[Reader]:
    """The readers of all formats, in order of precedence."""
    return [import_module(name).read for name in _READERS]


class Piece(Protocol):
    """Modules of an adapter that are stored together."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, of which the adapter may lack some."""


class Output(Protocol):
    """An output in the making, to which pieces are written in any order, from any process."""

    def write(self, piece: Any, modules: Mapping[str, Delta]) -> None:  # noqa: ANN401
        """Write a piece of the plan."""

    def flush(self) -> None:
        """Bring what has been written to the disk."""

    def written_elsewhere(self, piece: Any) -> None:  # noqa: ANN401
        """Take note that another process has written a piece."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Let go of it, complete or not."""


class Plan(Protocol):
    """What is to be written of an adapter, known before its modules are."""

    @property
    def modules(self) -> Mapping[str, Delta]:
        """The modules of the adapter."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """What is stored of them."""

    def open(self, path: Path, *, create: bool = True) -> Output:
        """The output in the making; made, or opened where another process has made it."""

    def write(self, path: Path) -> None:
        """Write all of it."""


class Layout(Protocol):
    """How an adapter was stored and is to be written; the algebra never looks inside."""

    @property
    def suffix(self) -> str:
        """What the paths of outputs end with; empty for directories."""

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters whose modules are named alike, to be written as this layout writes."""

    def merged(self, others: Sequence[Layout]) -> Layout:
        """The layout of a combination of adapters, or `IncompatibleError`."""

    def carrying(self, other: Layout) -> Layout:
        """The layout of a result that keeps the whole trained tensors of another adapter."""

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """The modules of another adapter that whole tensors of this one replace in a host."""

    @property
    def joins(self) -> bool:
        """Whether modules are put together when they are written, which takes their values."""

    def plan(self, adapter: Adapter, dtype: torch.dtype | None) -> Plan:
        """What is written of the adapter."""

    def rebased(self, base: str) -> Layout:
        """The same layout with another base model on record."""

    def stored_type(self, module: str) -> torch.dtype:
        """The type that a module's factors have in the file."""

    def describe(self) -> dict[str, Any]:
        """What there is to say of the files, as JSON values."""
