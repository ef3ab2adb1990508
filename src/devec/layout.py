"""What adapters and file formats know of each other: readers and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from devec.output import Writer

if TYPE_CHECKING:
    from devec.adapter import Adapter

Reader = Callable[[Path, str], "Adapter | None"]

# Filled by `devec.formats`, in order of precedence; a reader returns None for what is not its own.
READERS: list[Reader] = []


class Layout(Protocol):
    """How an adapter was stored and is to be written; the algebra never looks inside."""

    def merged(self, others: Sequence[Layout]) -> Layout:
        """The layout of a combination of adapters, or `IncompatibleError`."""

    def carrying(self, other: Layout) -> Layout:
        """The layout of a result that keeps the whole trained tensors of another adapter."""

    def writer(self, adapter: Adapter, dtype: torch.dtype | None) -> Writer:
        """A function that writes the adapter at a path; refusals are raised before it runs."""

    def rebased(self, base: str) -> Layout:
        """The same layout with another base model on record."""

    def describe(self) -> dict[str, Any]:
        """What there is to say of the files, as JSON values."""
