"""How a single-file adapter is stored, whatever its convention."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.adapter import Adapter
from devec.delta import Delta
from devec.errors import IncompatibleError, OutputError, located
from devec.formats import metadata as header
from devec.formats.align import aligned
from devec.formats.conventions import (
    DIFFUSERS,
    OLD_DIFFUSERS,
    PEFT_SUFFIXES,
    XLABS_SUFFIXES,
    Naming,
    Suffixes,
    family_of,
)
from devec.formats.names import parse
from devec.formats.peft_config import alternation
from devec.formats.places import Places, require_places, usual_dtype
from devec.formats.tensors import data_sha256, storable, write_tensors
from devec.layout import Layout
from devec.output import Writer

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileSlot:
    """Where the factors of one module are stored.

    Attributes:
        id: The module's id in the file.
        shape: Shape (out, in) of the weight.
        kernel: Shape of a convolution's kernel.
        down: Key of the factor on the input side.
        up: Key of the factor on the output side.
        alpha: Key of alpha; empty where scalings are folded into B.
        bias: Key of the change of the bias.
        dtypes: Storage types of down, up and alpha.
        rank: The rank it was read with; 0 if it was not.
        scaling: The scaling it was read with.
    """

    id: str
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    down: str
    up: str
    alpha: str
    bias: str
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    rank: int = 0
    scaling: float = 1.0

    def write(self, delta: Delta, dtype: torch.dtype | None, *, fold: bool) -> dict[str, Tensor]:
        """Stored tensors of a delta.

        Args:
            delta: The delta of the module.
            dtype: Storage type of the factors; by default that of the input.
            fold: Whether a scaling must be multiplied into B where there is no alpha.

        Returns:
            Key → tensor.

        Raises:
            OutputError: If a value is too large for the storage type.
        """
        tensors: dict[str, Tensor] = {}
        if self.alpha:
            alpha = _exact_alpha(delta, self.dtypes[2])
            if alpha is None:
                delta = delta.folded()
                alpha = _exact_alpha(delta, torch.float32)
            tensors[self.alpha] = torch.as_tensor(alpha)
        elif fold and delta.scaling != 1:
            delta = delta.folded()
        A, B = delta.A, delta.B
        if self.kernel:
            A = A.reshape(len(A), -1, *self.kernel)
            B = B.reshape(*B.shape, *(1 for _ in self.kernel))
        tensors[self.down] = storable(self.down, A, dtype or self.dtypes[0])
        tensors[self.up] = storable(self.up, B, dtype or self.dtypes[1])
        if delta.bias is not None:
            tensors[self.bias] = storable(self.bias, delta.bias, dtype or self.dtypes[1])
        return tensors


def _exact_alpha(delta: Delta, dtype: torch.dtype) -> Tensor | None:
    """Alpha = scaling · rank as it is stored, if a reader gets the same scaling from it."""
    alpha = torch.tensor(delta.scaling * delta.rank, dtype=dtype)
    return alpha if float(alpha) / delta.rank == delta.scaling else None


@dataclass(frozen=True)
class FileLayout:
    """How a single-file adapter is stored.

    Attributes:
        convention: What the convention is called.
        naming: How its modules are named.
        family: Name of the base model's family, empty if unknown.
        slots: Where each module is stored, in the order of the file.
        metadata: The strings of the header.
        by_metadata: Whether ranks and alphas stand in the header, as diffusers writes them.
        kinds: Module → ``"lora"``, ``"loha"``, …, where it was rewritten to plain factors.
        errors: Module → relative error, where factors had to be truncated.
    """

    convention: str
    naming: Naming
    family: str
    slots: tuple[FileSlot, ...]
    metadata: Mapping[str, str]
    by_metadata: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    suffix = SUFFIX

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
                known = slots.setdefault(slot.id, slot)
                if _layer(known.kernel) != _layer(slot.kernel):
                    raise IncompatibleError(
                        f"module {slot.id!r} is a convolution {known.kernel} in one adapter and "
                        f"{slot.kernel or 'no convolution'} in another"
                    )
        result = dataclasses.replace(self, slots=tuple(slots.values()))
        return dataclasses.replace(result, by_metadata=False) if others else result

    def carrying(self, other: Layout) -> FileLayout:  # noqa: ARG002
        """This layout; carried tensors are stored under their own keys."""
        return self

    def rebased(self, base: str) -> FileLayout:
        """The same layout with another base model on record.

        Args:
            base: Identifier or path of the base model.

        Returns:
            The layout.
        """
        metadata = {**self.metadata, "base_model_name_or_path": base}
        shapes = {slot.id: slot.shape for slot in self.slots}
        family, _ = family_of(shapes, header.base_hint(metadata))
        return dataclasses.replace(self, metadata=metadata, family=family)

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
            "header": dict(self.metadata),
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""
        return usual_dtype(slot.dtypes[1] for slot in self.slots)

    def same_names(self, other: object) -> bool:
        """Whether the same module has the same name under another layout."""
        return isinstance(other, FileLayout) and self.naming.agrees(other.naming)

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters named alike, to be written in this convention.

        Args:
            adapters: The adapters, the first of which this is the layout of.

        Returns:
            The adapters, cut into common pieces if they are named differently.
        """
        return aligned(adapters)

    def like(self, adapter: Adapter, places: Places) -> FileLayout:
        """A layout of this convention for modules of another.

        Args:
            adapter: The adapter that the modules are of.
            places: Module id → shape (out, in) and kernel.

        Returns:
            The layout; what older diffusers wrote is written as it does today.
        """
        slot = self.slots[0]
        ends = (key.removeprefix(slot.id) for key in (slot.down, slot.up, slot.alpha))
        convention, suffixes = self.convention, Suffixes(*ends)
        if self.naming.scheme == "xlabs":
            suffixes = XLABS_SUFFIXES
        elif convention == OLD_DIFFUSERS:
            convention, suffixes = DIFFUSERS, PEFT_SUFFIXES
        return plain_layout(adapter, places, self.naming, suffixes, convention)

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a module, empty if it is none of a convolution."""
        return self._kernels.get(module, ())

    @cached_property
    def _kernels(self) -> dict[str, tuple[int, ...]]:
        return {slot.id: slot.kernel for slot in self.slots}

    def writer(self, adapter: Adapter, dtype: torch.dtype | None) -> Writer:
        """A function that writes an adapter as one file.

        Args:
            adapter: The adapter, whose modules are among the slots.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The function, given the path of the file to make.
        """

        def write(path: Path) -> None:
            tensors, strings = self.stored(adapter, dtype)
            write_tensors(path, tensors, strings)

        return write

    def stored(
        self, adapter: Adapter, dtype: torch.dtype | None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and header of an adapter, as they go to the file.

        Args:
            adapter: The adapter.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            Key → tensor, and the header's strings.

        Raises:
            OutputError: If there is nothing to write.
            IncompatibleError: If a module has no place in the file.
        """
        require_places({slot.id: slot.shape for slot in self.slots}, adapter.modules)
        held = [slot for slot in self.slots if slot.id in adapter.modules]
        deltas = {slot.id: _at_least_one(adapter.modules[slot.id]) for slot in held}
        tensors: dict[str, Tensor] = {}
        as_read = self._as_read(deltas)
        for slot in held:
            with located(f"module {slot.id!r}"):
                tensors |= slot.write(deltas[slot.id], dtype, fold=not as_read)
        tensors |= adapter.carried
        if not tensors:
            raise OutputError("the adapter changes no module; there is nothing to write")
        scaled = {slot.id: deltas[slot.id] for slot in held}
        if not as_read:
            scaled = {
                slot.id: scaled[slot.id] if slot.alpha else scaled[slot.id].folded()
                for slot in held
            }
        return tensors, self._strings(adapter, scaled, tensors, as_read=as_read)

    def _as_read(self, deltas: Mapping[str, Delta]) -> bool:
        """Whether ranks and alphas in the header still hold, for all modules that it names."""
        return self.by_metadata and all(
            slot.id in deltas
            and deltas[slot.id].rank == slot.rank
            and deltas[slot.id].scaling == slot.scaling
            for slot in self.slots
        )

    def _strings(
        self,
        adapter: Adapter,
        deltas: Mapping[str, Delta],
        tensors: Mapping[str, Tensor],
        *,
        as_read: bool,
    ) -> dict[str, str]:
        """The header's strings for the tensors written."""
        ranks = [delta.rank for delta in deltas.values()]
        alphas = [delta.scaling * delta.rank for delta in deltas.values()]
        needs_hash = {"sshs_model_hash", "modelspec.hash_sha256"} & self.metadata.keys()
        digest = data_sha256(tensors) if needs_hash else ""
        if adapter.sha256:
            strings = header.unchanged(self.metadata, ranks, alphas, digest)
        else:
            strings = header.of_result(
                self.metadata, adapter.name, adapter.provenance, ranks, alphas, digest
            )
        if as_read:
            strings[header.ADAPTER_KEY] = self.metadata[header.ADAPTER_KEY]
        elif _is_diffusers(self) and len(set(ranks)) > 1:
            strings[header.ADAPTER_KEY] = _patterns(deltas)
        return strings


def _layer(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel, where one of a single point is none."""
    return kernel if any(size != 1 for size in kernel) else ()


def _at_least_one(delta: Delta) -> Delta:
    """A delta of rank 1 at least: no reader knows rank 0."""
    if delta.rank:
        return delta
    B, A = torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1])
    return dataclasses.replace(delta, B=B.to(delta.B), A=A.to(delta.A))


def _is_diffusers(layout: FileLayout) -> bool:
    """Whether diffusers reads the file by names of its own, and so its metadata."""
    return layout.convention == DIFFUSERS and not any(slot.alpha for slot in layout.slots)


def _patterns(deltas: Mapping[str, Delta]) -> str:
    """Diffusers' configuration for modules of different ranks, by component."""
    config: dict[str, Any] = {}
    for module, delta in deltas.items():
        name = parse(module)
        component = name.prefix.rstrip(".")
        ranks = config.setdefault(component, {})
        ranks[name.path] = delta.rank
    fields: dict[str, Any] = {}
    for component, ranks in config.items():
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
        fields |= {
            f"{component}.r": usual,
            f"{component}.lora_alpha": usual,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": alternation(list(ranks)),
        }
    return json.dumps(fields, sort_keys=True)


def plain_layout(
    adapter: Adapter,
    places: Places,
    naming: Naming,
    suffixes: Suffixes,
    convention: str,
) -> FileLayout:
    """A layout for modules that come from another convention.

    Args:
        adapter: The adapter the modules are of; its header is kept, if it has one.
        places: Module id → shape (out, in) and kernel.
        naming: How the modules are named.
        suffixes: How their tensors are called.
        convention: What the convention is called.

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
        FileSlot(module, shape, kernel, *suffixes.keys(module), dtypes=dtypes)
        for module, (shape, kernel) in places.items()
    )
    return FileLayout(convention, naming, described.get("family") or "", slots, strings)
