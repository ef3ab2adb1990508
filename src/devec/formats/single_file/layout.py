"""How a single-file adapter is stored, whatever its convention."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Layout
from devec.base_model.model import BaseModel, base_model
from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.errors import IncompatibleError
from devec.formats.alignment.align import aligned
from devec.formats.magnitudes import MagnitudeSlot
from devec.formats.plan import FilePlan, Piece, Places, require_places, spread, usual_dtype
from devec.formats.rank_patterns import alternation, rank_pattern
from devec.formats.single_file import header
from devec.formats.single_file.dora import Form, dora_forms
from devec.formats.single_file.slot import FileSlot, anew, exact_alpha, one_alpha
from devec.lazy import outlines
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
from devec.naming.tables import TABLES

# UNets whose files diffusers reads by one alpha for all attention layers
_ONE_ALPHA = ("sd", "sd2", "sdxl")
SUFFIX = ".safetensors"

Written = Mapping[str, Delta]


@dataclass(frozen=True)
class FileLayout:
    """How a single-file adapter is stored.

    Attributes:
        convention: What the convention is called.
        naming: How its modules are named.
        suffixes: How their tensors are called, where they have not been yet.
        family: Name of the base model's family, empty if unknown.
        slots: Where each module is stored, in the order of the file.
        metadata: The strings of the header.
        base: The base model that was given with the adapter.
        by_metadata: Whether ranks and alphas stand in the header, as diffusers writes them.
        kinds: Module → ``"LoHa"``, ``"LoKr"``, …, where it was rewritten to plain factors.
        errors: Module → relative error, where factors had to be truncated.
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

    suffix = SUFFIX
    joins = False

    def merged(self, others: Sequence[Layout]) -> FileLayout:
        """The layout of a combination with other adapters, which are named alike.

        Args:
            others: Layouts of the others.

        Returns:
            This layout with the slots of all.

        Raises:
            IncompatibleError: If one of the others is not that of a single file.
        """
        slots = {slot.id: slot for slot in self.slots}
        for other in others:
            if not isinstance(other, FileLayout):
                raise IncompatibleError("adapters of different kinds of files were not aligned")
            for slot in other.slots:
                spelled = slot.magnitude.under(slot.id + self.suffixes.magnitude)
                known = slots.setdefault(slot.id, dataclasses.replace(slot, magnitude=spelled))
                if spread(known.kernel) != spread(slot.kernel):
                    raise IncompatibleError(
                        f"module {slot.id!r} is a convolution {known.kernel} in one adapter and "
                        f"{slot.kernel or 'no convolution'} in another"
                    )
                if known.magnitude.axis is None and slot.magnitude.axis:
                    slots[slot.id] = dataclasses.replace(known, magnitude=spelled)
        layouts = [self, *(other for other in others if isinstance(other, FileLayout))]
        return dataclasses.replace(
            self,
            slots=tuple(slots.values()),
            base=next((o.base for o in layouts if o.base.reference is not None), self.base),
            by_metadata=self.by_metadata and not others,
            kinds={module: kind for o in layouts for module, kind in o.kinds.items()},
            errors={module: error for o in layouts for module, error in o.errors.items()},
        )

    def carrying(self, other: Layout) -> FileLayout:  # noqa: ARG002
        """This layout; carried tensors are stored under their own keys."""
        return self

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:  # noqa: ARG002
        """No module: hosts of files add what they are given to the weights that are there."""
        return []

    def rebased(self, base: str) -> FileLayout:
        """The same layout with another base model on record.

        Args:
            base: Identifier or path of the base model.

        Returns:
            The layout.
        """
        metadata = {**self.metadata, "base_model_name_or_path": base}
        shapes = {slot.id: slot.shape for slot in self.slots}
        family, table = detect_family(shapes, header.base_hint(metadata))
        naming = naming_of(shapes, table)  # whose names these are shows by the family's tables
        return dataclasses.replace(self, metadata=metadata, family=family, naming=naming)

    def describe(self) -> dict[str, Any]:
        """What there is to say of the file, as JSON values."""
        return {
            "format": self.convention,
            "family": self.family or None,
            "base_model": self.metadata.get("base_model_name_or_path"),
            "base_version": self.metadata.get("ss_base_model_version"),
            "architecture": self.metadata.get("modelspec.architecture"),
            "rewritten": dict(Counter(self.kinds.values())),
            "truncated": dict(self.errors),
            "dora": dict(Counter(s.magnitude.axis for s in self.slots if s.magnitude.axis)),
            "header": dict(self.metadata),
        }

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""
        return usual_dtype(slot.dtypes[1] for slot in self.slots)

    def same_names(self, other: object) -> bool:
        """Whether the same module has the same name under another layout."""
        if not isinstance(other, FileLayout):
            return False
        return self.naming.same_ids_as(other.naming) or (
            self.naming.same_style_as(other.naming)
            and all(self._ids.get(key, id) == id for key, id in other._ids.items())
        )

    @cached_property
    def _ids(self) -> dict[tuple[str, str], str]:
        """What two names of a module have in common → its id."""
        return {parse_module_id(slot.id).key: slot.id for slot in self.slots}

    def same_spelling(self, naming: Naming) -> bool:
        """Whether files are written in a naming as they are."""
        return self.naming.same_ids_as(naming)

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters named alike, to be written in this convention.

        Args:
            adapters: The adapters, the first of which this is the layout of.

        Returns:
            The adapters, cut into common pieces if they are named differently.
        """
        return aligned(adapters)

    def like(self, adapter: Adapter, places: Places, family: str) -> FileLayout:
        """A layout of this convention for modules of another.

        Args:
            adapter: The adapter that the modules are of.
            places: Module id → shape (out, in) and kernel.
            family: Name of the base model's family.

        Returns:
            The layout; what older diffusers wrote is written as it does today.
        """
        convention, suffixes = self.convention, self.suffixes
        if convention == OLD_DIFFUSERS:
            convention, suffixes = DIFFUSERS, PEFT_SUFFIXES
        return plain_layout(adapter, places, self.naming, suffixes, convention, family)

    def stored_type(self, module: str) -> torch.dtype:
        """The type that a module's factors have in the file."""
        slot = self._slot_of[module]
        return slot.read_as or slot.dtypes[1]

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a module, empty if it is none of a convolution."""
        return self._slot_of[module].kernel

    @cached_property
    def _slot_of(self) -> dict[str, FileSlot]:
        return {slot.id: slot for slot in self.slots}

    def plan(self, adapter: Adapter, dtype: torch.dtype | None) -> FilePlan:
        """What is written of an adapter as one file.

        Args:
            adapter: The adapter, whose modules are among the slots.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The plan, from outlines.

        Raises:
            IncompatibleError: If a module has no place in the file, or no DoRA represents it.
            UnsupportedError: If no DoRA of the format is such a delta.
        """
        known = outlines(adapter.modules)
        require_places({slot.id: slot.shape for slot in self.slots}, known)
        unchanged = bool(adapter.sha256)
        held = {s.id: known[s.id].outline for s in self.slots if s.id in known}
        if any(delta.gain is not None for delta in held.values()):
            require_representable(adapter.modules)
        doras = dora_forms(held, self._slot_of, self.weight, unchanged=unchanged)
        usual: tuple[Form, ...] = (_at_least_one,)
        forms = {m: (doras[m], *usual) if m in doras else usual for m in held}
        written = {module: _formed(delta, forms[module]) for module, delta in held.items()}
        by_metadata = self._metadata_holds(written)
        if not by_metadata:
            for express in (self._expressible, self._of_one_alpha(written)):
                for module, form in express(written).items():
                    forms[module] = (*forms[module], form)
                    written[module] = form(written[module])
        slots = [s if unchanged else anew(s) for s in self.slots if s.id in held]
        return FilePlan(
            modules=adapter.modules,
            pieces=[
                Piece(slot.id, (slot.id,), partial(_tensors, slot, forms[slot.id], dtype))
                for slot in slots
            ],
            whole=adapter.carried,
            strings=lambda digest: self._strings(adapter, written, digest, by_metadata=by_metadata),
            hashed=bool({"sshs_model_hash", "modelspec.hash_sha256"} & self.metadata.keys()),
        )

    def weight(self, module: str) -> BaseWeight:
        """The base weight of a module, not yet read."""
        table = TABLES.get(self.family)
        family = table() if table else None
        return self.base.weight(module, self._slot_of[module].shape, family=family)

    def _metadata_holds(self, deltas: Mapping[str, Delta]) -> bool:
        """Whether ranks and alphas in the header still hold, for all modules that it names."""
        return self.by_metadata and all(
            slot.id in deltas and slot.as_read(deltas[slot.id]) for slot in self.slots
        )

    def _expressible(self, deltas: Mapping[str, Delta]) -> dict[str, Form]:
        """How deltas get scalings that the file can express, where theirs are not: by folding."""
        return {
            module: Delta.folded
            for module, delta in deltas.items()
            if delta.scaling != 1
            and (not self._slot_of[module].alpha or exact_alpha(delta, torch.float32) is None)
        }

    def _of_one_alpha(self, deltas: Mapping[str, Delta]) -> Callable[[Written], dict[str, Form]]:
        """How deltas get one alpha, where they are not as they were read and readers want one."""
        slots = self._slot_of
        kept = all(slots[module].as_read(delta) for module, delta in deltas.items())
        if kept or self.family not in _ONE_ALPHA:
            return lambda _: {}
        return lambda written: one_alpha({m: d for m, d in written.items() if slots[m].alpha})

    def _strings(
        self,
        adapter: Adapter,
        deltas: Mapping[str, Delta],
        digest: str,
        *,
        by_metadata: bool,
    ) -> dict[str, str]:
        """The header's strings for the deltas written and the digest of the data."""
        ranks = [delta.rank for delta in deltas.values()]
        alphas = [delta.scaling * delta.rank for delta in deltas.values()]
        if adapter.sha256 and not self.kinds:
            strings = header.unchanged(self.metadata, digest)
        else:
            strings = header.of_result(
                self.metadata, adapter.name, adapter.provenance, ranks, alphas, digest
            )
        if by_metadata:
            strings[header.ADAPTER_KEY] = self.metadata[header.ADAPTER_KEY]
        elif _is_diffusers(self) and len(set(ranks)) > 1:
            strings[header.ADAPTER_KEY] = _patterns(deltas)
        return strings


def _formed(delta: Delta, forms: Sequence[Form]) -> Delta:
    """A delta in the form in which it is stored."""
    for form in forms:
        delta = form(delta)
    return delta


def _tensors(
    slot: FileSlot, forms: Sequence[Form], dtype: torch.dtype | None, deltas: Mapping[str, Delta]
) -> dict[str, Tensor]:
    """What is stored of a module."""
    return slot.write(_formed(deltas[slot.id], forms), dtype)


def _at_least_one(delta: Delta) -> Delta:
    """A delta of rank 1 at least: no reader knows rank 0."""
    if delta.rank:
        return delta
    B, A = delta.B.new_zeros(delta.shape[0], 1), delta.A.new_zeros(1, delta.shape[1])
    return dataclasses.replace(delta, B=B, A=A)


def _is_diffusers(layout: FileLayout) -> bool:
    """Whether diffusers reads the file by names of its own, and so its metadata."""
    return layout.convention == DIFFUSERS and not any(slot.alpha for slot in layout.slots)


def _patterns(deltas: Mapping[str, Delta]) -> str:
    """Diffusers' configuration for modules of different ranks, by component."""
    config: dict[str, dict[str, int]] = {}
    fields: dict[str, Any] = {}
    for module, delta in deltas.items():
        name = parse_module_id(module)
        component = name.prefix.rstrip(".")
        config.setdefault(component, {})[name.path] = delta.rank
        if delta.gain is not None:
            fields[f"{component}.use_dora"] = True
    for component, ranks in config.items():
        # newer transformers have no text_model in CLIP, which diffusers heeds in keys alone
        usual, others = rank_pattern(ranks, optional="text_model.")
        fields |= {
            f"{component}.r": usual,
            f"{component}.lora_alpha": usual,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": alternation(list(ranks), optional="text_model."),
        }
    return json.dumps(fields, sort_keys=True)


def plain_layout(
    adapter: Adapter,
    places: Places,
    naming: Naming,
    suffixes: Suffixes,
    convention: str,
    family: str,
) -> FileLayout:
    """A layout for modules that come from another convention.

    Args:
        adapter: The adapter the modules are of; its header is kept, if it has one.
        places: Module id → shape (out, in) and kernel.
        naming: How the modules are named.
        suffixes: How their tensors are called.
        convention: What the convention is called.
        family: Name of the base model's family.

    Returns:
        The layout.
    """
    layout: Any = adapter.layout
    described = layout.describe()
    strings = dict(described.get("header") or {})
    if described.get("base_model"):
        strings["base_model_name_or_path"] = described["base_model"]
    dtypes = (layout.dtype, layout.dtype, torch.float32)
    slots = tuple(
        FileSlot(
            module,
            shape,
            kernel,
            *suffixes.keys(module),
            magnitude=MagnitudeSlot(module + suffixes.magnitude),
            dtypes=dtypes,
        )
        for module, (shape, kernel) in places.items()
    )
    return FileLayout(convention, naming, suffixes, family, slots, strings, layout.base)
