"""The layout of single-file adapters, whatever their convention."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch

from devec.adapters.layout import About, Contents, Layout, ModuleNames, ModuleShapes, extended
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError
from devec.formats.magnitudes import MagnitudeSlot
from devec.formats.merging import all_of_class, first_base, usual_dtype
from devec.formats.plan import FilePlan
from devec.formats.single_file.header import base_hint
from devec.formats.single_file.planning import planned_file
from devec.formats.single_file.slot import FileSlot
from devec.formats.single_file.storage import SUFFIX, FileStorage
from devec.naming.conventions import (
    DIFFUSERS,
    OLD_DIFFUSERS,
    PEFT_SUFFIXES,
    Naming,
    Suffixes,
    naming_of,
)
from devec.naming.detection import detect_family
from devec.naming.module_id import parse_module_id


class FileLayout(FileStorage):
    """How a single-file adapter is stored; the attributes are those of `FileStorage`."""

    suffix = SUFFIX
    joins = False

    @cached_property
    def names(self) -> ModuleNames:
        """Names of modules: their ids in the file."""
        ids = {parse_module_id(slot.id).key: slot.id for slot in self.slots}
        return ModuleNames(self.naming, self.family, ids)

    @property
    def about(self) -> About:
        """What the header and the keys say about the adapter."""
        return About(
            format=self.convention,
            family=self.family or None,
            base_model=self.metadata.get("base_model_name_or_path"),
            base_version=self.metadata.get("ss_base_model_version"),
            architecture=self.metadata.get("modelspec.architecture"),
            rewritten=dict(Counter(self.kinds.values())),
            truncated=dict(self.errors),
            dora=dict(Counter(s.magnitude.axis for s in self.slots if s.magnitude.axis)),
            header=dict(self.metadata),
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The most frequent storage type of the factors."""
        return usual_dtype(slot.dtypes[1] for slot in self.slots)

    def stored_type(self, module: str) -> torch.dtype:
        """The storage type of a module's factors in the file that was read."""
        slot = self.slot_of[module]
        return slot.read_as or slot.dtypes[1]

    def kernel(self, module: str) -> tuple[int, ...]:
        """Shape of a convolution's kernel; empty for other layers."""
        return self.slot_of[module].kernel

    def merged(self, others: Sequence[Layout]) -> FileLayout:
        """The layout of a combination with other adapters: this one with the slots of all."""
        layouts = [self, *all_of_class(others, FileLayout)]
        slots = dict(self.slot_of)
        for slot in (slot for layout in layouts[1:] for slot in layout.slots):
            spelled = slot.magnitude.under(slot.id + self.suffixes.magnitude)
            known = slots.setdefault(slot.id, dataclasses.replace(slot, magnitude=spelled))
            if extended(known.kernel) != extended(slot.kernel):
                raise IncompatibleError(
                    f"module {slot.id!r} is a convolution {known.kernel} in one adapter and "
                    f"{slot.kernel or 'no convolution'} in another"
                )
            if known.magnitude.axis is None and slot.magnitude.axis:
                slots[slot.id] = dataclasses.replace(known, magnitude=spelled)
        return dataclasses.replace(
            self,
            slots=tuple(slots.values()),
            base=first_base(layouts),
            by_metadata=self.by_metadata and not others,
            kinds={module: kind for o in layouts for module, kind in o.kinds.items()},
            errors={module: error for o in layouts for module, error in o.errors.items()},
        )

    def carrying(self, other: Layout) -> FileLayout:  # noqa: ARG002
        """This layout; carried tensors are stored under their own keys."""
        return self

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:  # noqa: ARG002
        """No module: hosts of single files add factors to the weights that they find."""
        return []

    def rebased(self, base: str) -> FileLayout:
        """The same layout with another base model in its header, and its family."""
        metadata = {**self.metadata, "base_model_name_or_path": base}
        shapes = {slot.id: slot.shape for slot in self.slots}
        family, table = detect_family(shapes, base_hint(metadata))
        naming = naming_of(
            shapes, table
        )  # the scheme of names is recognised by the family's tables
        return dataclasses.replace(self, metadata=metadata, family=family, naming=naming)

    def like(
        self,
        other: Layout,
        modules: Mapping[str, Delta],  # noqa: ARG002  # a file has no configuration to write
        shapes: ModuleShapes,
        family: str,
    ) -> FileLayout:
        """A layout of this convention; older diffusers' convention becomes today's."""
        convention, suffixes = self.convention, self.suffixes
        if convention == OLD_DIFFUSERS:
            convention, suffixes = DIFFUSERS, PEFT_SUFFIXES
        return file_layout_for(other, shapes, self.naming, suffixes, convention, family)

    def plan(self, contents: Contents, dtype: torch.dtype | None) -> FilePlan:
        """What will be written; see `planned_file` for the errors."""
        return planned_file(self, contents, dtype)


def file_layout_for(
    other: Layout,
    shapes: ModuleShapes,
    naming: Naming,
    suffixes: Suffixes,
    convention: str,
    family: str,
) -> FileLayout:
    """A single-file layout for an adapter with another layout.

    Args:
        other: The layout of the adapter; its header is kept, if it has one.
        shapes: Id of a module to write → shape.
        naming: How the modules are named.
        suffixes: Suffixes of keys.
        convention: Name of the convention.
        family: Name of the base model's family; empty if it is unknown.

    Returns:
        The layout.
    """
    about = other.about
    strings = dict(about.header)
    if about.base_model:
        strings["base_model_name_or_path"] = about.base_model
    dtypes = (other.dtype, other.dtype, torch.float32)
    slots = tuple(
        FileSlot(
            module,
            shape,
            kernel,
            *suffixes.keys(module),
            magnitude=MagnitudeSlot(module + suffixes.magnitude),
            dtypes=dtypes,
        )
        for module, (shape, kernel) in shapes.items()
    )
    return FileLayout(convention, naming, suffixes, family, slots, strings, other.base)
