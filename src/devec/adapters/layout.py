"""What an adapter needs of its file format: the layout that stores it, and the plan of an output.

Formats implement `Layout` and `Plan`; nothing here depends on a format or on `Adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from devec.base_model.model import BaseModel
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed, located
from devec.naming.conventions import Naming

# A LoHa of rank 16 and a LoKr of factor 8 and rank 32 are still exact with this many columns, which
# are as many as a large LoRA has.
MAX_RANK = 256


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        max_rank: Largest rank of the factors that a LoHa or LoKr is rewritten to; a larger one is
            truncated, and its error stated.
        allow_pickle: Whether pickled state dicts may be read.
        base: The base model whose weights DoRAs need: a path, the id of a repository, or a model.
            Nothing of it is read before a weight is needed.
    """

    max_rank: int = MAX_RANK
    allow_pickle: bool = False
    base: object | None = None


@dataclass(frozen=True)
class Contents:
    """What a layout writes of an adapter.

    Attributes:
        name: Name of the adapter.
        modules: Module → delta.
        carried: Key → whole trained tensor.
        provenance: The record of the operation that made the adapter, if any.
        unchanged: Whether the adapter is unchanged since it was read from a file.
    """

    name: str
    modules: Mapping[str, Delta]
    carried: Mapping[str, Tensor]
    provenance: Mapping[str, Any] | None
    unchanged: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Modules of an adapter that are stored together.

    Attributes:
        name: Name for messages.
        modules: Names of the modules, of which the adapter may lack some.
        tensors: Maps the deltas of those modules to the stored tensors by key, and outlines to
            outlines.
    """

    name: str
    modules: tuple[str, ...]
    tensors: Callable[[Mapping[str, Delta]], dict[str, Tensor]]

    def stored(self, modules: Mapping[str, Delta]) -> dict[str, Tensor]:
        """The stored tensors of the piece, from the modules of an adapter."""
        with located(f"module {self.name!r}"):
            return self.tensors({name: modules[name] for name in self.modules if name in modules})


class Output(Protocol):
    """An unfinished output, to which pieces are written in any order and from any process."""

    def write(self, piece: Piece, modules: Mapping[str, Delta]) -> None:
        """Write a piece of the plan."""

    def flush(self) -> None:
        """Write buffered data to the disk."""

    def written_elsewhere(self, piece: Piece) -> None:
        """Record that another process has written a piece."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Close the file, whether or not it is complete."""


class Plan(Protocol):
    """What will be written of an adapter; made from outlines, before any value is read."""

    @property
    def modules(self) -> Mapping[str, Delta]:
        """The modules of the adapter."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """The pieces that the modules are stored in."""

    def open(self, path: Path, *, create: bool = True) -> Output:
        """Open an output that this or another process creates."""

    def write(self, path: Path) -> None:
        """Write all of the output."""


class ModuleShape(NamedTuple):
    """Shape of a module's weight.

    Attributes:
        shape: (out, in), that of a convolution flattened.
        kernel: Shape of a convolution's kernel; empty for other layers.
    """

    shape: tuple[int, int]
    kernel: tuple[int, ...]


ModuleShapes = Mapping[str, ModuleShape]


def require_shapes_fit(shapes: Mapping[str, tuple[int, int]], modules: Mapping[str, Delta]) -> None:
    """Refuse modules that a layout cannot store: they would be lost.

    Args:
        shapes: Module → shape (out, in) of the weight, for modules that the layout can store.
        modules: The modules to write.

    Raises:
        IncompatibleError: If the layout lacks a module or has it in another shape.
    """
    lost = [module for module, delta in modules.items() if shapes.get(module) != delta.shape]
    if lost:
        raise IncompatibleError(
            f"the layout has no place for the modules {listed(lost)}; it is that of an adapter "
            "without them, or of another base model"
        )


def extended(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel, or nothing if it has a single element: such a convolution is a linear layer."""
    return kernel if any(size != 1 for size in kernel) else ()


@dataclass(frozen=True)
class ModuleNames:
    """How the modules of an adapter are named; alignment compares these values.

    Attributes:
        naming: How the names are spelled.
        family: Name of the base model's family; empty if it is unknown.
        ids: Component and canonical name of a module → its name in this adapter.
        verbatim: Whether modules are named as in the base model itself, as in PEFT directories.
    """

    naming: Naming
    family: str = ""
    ids: Mapping[tuple[str, str], str] = field(default_factory=dict)
    verbatim: bool = False

    def agree(self, other: ModuleNames) -> bool:
        """Whether the same module has the same name in both adapters."""
        if self.verbatim or other.verbatim:
            return self.verbatim and other.verbatim
        return self.naming.same_ids_as(other.naming) or (
            self.naming.same_style_as(other.naming)
            and all(self.ids.get(key, id) == id for key, id in other.ids.items())
        )

    def spelled(self, naming: Naming) -> bool:
        """Whether the names are already those of another naming."""
        return naming.one_model if self.verbatim else self.naming.same_ids_as(naming)


@dataclass(frozen=True)
class About:
    """What the files of an adapter say about it.

    Attributes:
        format: Name of the convention: ``"peft"``, ``"kohya"``, ``"diffusers"``, …
        family: Name of the base model's family.
        base_model: Id or path of the base model on record.
        base_version: Version of the base model, as kohya's trainers record it.
        architecture: Architecture of the base model, as Stability's ModelSpec records it.
        task_type: PEFT's name of the task.
        peft_version: Version of PEFT that wrote the adapter.
        base_copies: Keys of base weights that PEFT stored beside the adapter.
        rewritten: ``"LoHa"``, ``"LoKr"``, … → number of modules rewritten to factors.
        truncated: Module → relative error, for modules whose rank had to be truncated.
        dora: Axis of the magnitudes (``"out"``, ``"in"``) → number of DoRA modules.
        header: The strings of a single file's header.
    """

    format: str
    family: str | None = None
    base_model: str | None = None
    base_version: str | None = None
    architecture: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    base_copies: tuple[str, ...] = ()
    rewritten: Mapping[str, int] = field(default_factory=dict)
    truncated: Mapping[str, float] = field(default_factory=dict)
    dora: Mapping[str, int] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)


class Layout(Protocol):
    """How an adapter was stored and will be written."""

    @property
    def suffix(self) -> str:
        """Suffix of output paths; empty for directories."""

    @property
    def joins(self) -> bool:
        """Whether modules are joined when they are written, which requires their values."""

    @property
    def names(self) -> ModuleNames:
        """How the modules are named."""

    @property
    def about(self) -> About:
        """What the files say about the adapter."""

    @property
    def base(self) -> BaseModel:
        """The base model that was given with the adapter."""

    @property
    def dtype(self) -> torch.dtype:
        """The most frequent storage type of the factors."""

    def stored_type(self, module: str) -> torch.dtype:
        """The storage type of a module's factors."""

    def kernel(self, module: str) -> tuple[int, ...]:
        """Shape of a convolution's kernel; empty for other layers."""

    def merged(self, others: Sequence[Layout]) -> Layout:
        """The layout of a combination with other adapters, whose names agree."""

    def carrying(self, other: Layout) -> Layout:
        """The layout of a result that keeps the carried tensors of another adapter."""

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """The modules of another adapter that carried tensors of this one replace in a host."""

    def rebased(self, base: str) -> Layout:
        """The same layout with another base model on record."""

    def like(
        self, other: Layout, modules: Mapping[str, Delta], shapes: ModuleShapes, family: str
    ) -> Layout:
        """A layout of this convention for an adapter with another layout.

        Args:
            other: The layout of the adapter.
            modules: Its modules, named as they are there.
            shapes: Module to write, named as in this convention → shape.
            family: Name of the base model's family; empty if it is unknown.
        """

    def plan(self, contents: Contents, dtype: torch.dtype | None) -> Plan:
        """What will be written, with another storage type if one is given."""
