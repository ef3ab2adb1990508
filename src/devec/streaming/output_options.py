"""Options for the files of the parts: type, rank, format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from devec.adapters.adapter import Adapter
from devec.arguments import whole_number
from devec.formats.convert import convert
from devec.lazy import outlines


@dataclass(frozen=True)
class OutputOptions:
    """How parts are written.

    Attributes:
        dtype: Storage type; by default that of the inputs.
        compact: Whether parts are cut to their numerical ranks.
        as_lora: Rank of the nearest plain LoRAs that are written instead of DoRAs; None to write
            DoRAs.
        format: A key of `devec.formats.convert.FORMATS`; by default that of the first input.
    """

    dtype: torch.dtype | None = None
    compact: bool = False
    as_lora: int | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        if self.as_lora is not None:
            object.__setattr__(self, "as_lora", whole_number(self.as_lora, "rank (as_lora)"))

    @property
    def as_read(self) -> bool:
        """Whether parts are written with the ranks and in the format of their originals."""
        return not self.compact and self.as_lora is None and self.format is None

    def suffix(self, adapters: Sequence[Adapter]) -> str:
        """What the paths of outputs end with, from outlines alone."""
        first = adapters[0]
        if self.as_lora is not None:
            known = {
                m: dataclasses.replace(d, gain=None) for m, d in outlines(first.modules).items()
            }
            first = dataclasses.replace(first, modules=known)
        layout = self.converted(first).layout
        return layout.suffix if layout is not None else ""

    def converted(self, adapter: Adapter) -> Adapter:
        """A part in the requested format, with the record of the decomposition."""
        if self.format is None:
            return adapter
        return dataclasses.replace(convert(adapter, self.format), provenance=adapter.provenance)
