"""What a single-file adapter stores, apart from values, whatever its convention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from devec.base_model.model import BaseModel, base_model
from devec.deltas.base_weight import BaseWeight
from devec.formats.single_file.slot import FileSlot
from devec.naming.conventions import DIFFUSERS, Naming, Suffixes
from devec.naming.tables import TABLES

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileStorage:
    """What a single-file adapter stores.

    Attributes:
        convention: Name of the convention.
        naming: How modules are named.
        suffixes: Suffixes of keys, for tensors that the file does not have yet.
        family: Name of the base model's family; empty if it is unknown.
        slots: The slots of the modules, in the order of the file.
        metadata: The strings of the header.
        base: The base model that was given with the adapter.
        by_metadata: Whether ranks and alphas are in the header, as diffusers writes them.
        kinds: Module → ``"LoHa"``, ``"LoKr"``, …, for modules that were rewritten to plain factors.
        errors: Module → relative error, for modules whose factors were truncated.
    """

    convention: str
    naming: Naming
    suffixes: Suffixes
    family: str
    slots: tuple[FileSlot, ...]
    metadata: Mapping[str, str]
    base: BaseModel = field(default_factory=lambda: base_model(None))
    by_metadata: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def slot_of(self) -> dict[str, FileSlot]:
        """Module → slot."""
        return {slot.id: slot for slot in self.slots}

    @property
    def is_diffusers(self) -> bool:
        """Whether diffusers reads the file by its own names, and so its metadata."""
        return self.convention == DIFFUSERS and not any(slot.alpha for slot in self.slots)

    def weight(self, module: str) -> BaseWeight:
        """The base weight of a module, not yet read."""
        table = TABLES.get(self.family)
        family = table() if table else None
        return self.base.weight(module, self.slot_of[module].shape, family=family)
