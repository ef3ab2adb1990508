"""Adapters of different conventions brought under common names.

What one convention stores as one module may be several in another. Modules are cut into the finest
pieces that any of the adapters, or the output, tells apart: B's rows are sliced and A is shared,
which is exact. When they are written, the pieces of a module are put together again: side by side
if they share A, else as a block-diagonal B with the As stacked, which is exact, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Layout, Plan
from devec.base_model.model import BaseModel
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.errors import IncompatibleError, UnsupportedError, listed, located
from devec.formats.alignment.cutting import (
    Module,
    Pieces,
    Tables,
    cut,
    pieces_of,
    require_no_collision,
    sliced,
)
from devec.formats.alignment.joining import Target
from devec.formats.plan import Places, require_places, spread
from devec.lazy import LazyMapping, outlines, renamed
from devec.naming.conventions import Naming
from devec.naming.families import Family
from devec.naming.module_id import parse_module_id
from devec.naming.tables import TABLES, segments_of


class NamedLayout(Layout, Protocol):
    """A layout whose modules are named by a naming."""

    def merged(self, others: Sequence[Layout]) -> NamedLayout:
        """The layout of a combination of adapters."""

    def carrying(self, other: Layout) -> NamedLayout:
        """The layout of a result that keeps the whole trained tensors of another adapter."""

    def rebased(self, base: str) -> NamedLayout:
        """The same layout with another base model on record."""

    @property
    def naming(self) -> Naming:
        """How the modules are named."""

    @property
    def base(self) -> BaseModel:
        """The base model that was given with the adapter."""

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a module, empty if it is none of a convolution."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""

    def same_names(self, other: object) -> bool:
        """Whether the same module has the same name under another layout."""

    def like(self, adapter: Adapter, places: Places, family: str) -> NamedLayout:
        """A layout of this convention for modules of another."""


Build = Callable[[Adapter, Places, str], NamedLayout]  # with the name of the family


@dataclass(frozen=True)
class AlignedLayout:
    """A layout that puts pieces together and leaves the rest to that of the whole modules.

    Attributes:
        inner: The layout of the whole modules.
        targets: Whole module → the pieces it is made of.
        kernels: Piece → kernel.
        carried: Key of a carried tensor → its key in the output.
    """

    inner: NamedLayout
    targets: Mapping[str, Target]
    kernels: Mapping[str, tuple[int, ...]]
    carried: Mapping[str, str]

    @property
    def naming(self) -> Naming:
        """How pieces are named: by diffusers' names or those of the output, without prefixes."""
        return Naming({}, flat=False, scheme=self.inner.naming.scheme)

    @property
    def base(self) -> BaseModel:
        """The base model that was given with the adapter."""
        return self.inner.base

    @property
    def suffix(self) -> str:
        """What the paths of outputs end with."""
        return self.inner.suffix

    @property
    def joins(self) -> bool:
        """That modules are put together when they are written, which takes their values."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""
        return self.inner.dtype

    def stored_type(self, module: str) -> torch.dtype:  # noqa: ARG002
        """The type that a piece is stored in."""
        return self.inner.dtype

    def same_names(self, other: object) -> bool:
        """Whether another layout was aligned together with this one."""
        return isinstance(other, AlignedLayout) and other.targets is self.targets

    def same_spelling(self, naming: Naming) -> bool:  # noqa: ARG002
        """Whether files are written in a naming as they are: pieces never are."""
        return False

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a piece."""
        return self.kernels.get(module, ())

    def like(self, adapter: Adapter, places: Places, family: str) -> NamedLayout:
        """A layout of the convention that is written."""
        return self.inner.like(adapter, places, family)

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters named alike; as they are if they were aligned together."""
        return aligned(adapters)

    def merged(self, others: Sequence[Layout]) -> AlignedLayout:
        """The layout of a combination of adapters that were aligned together."""
        inner = [other.inner for other in others if isinstance(other, AlignedLayout)]
        merged = self.inner.merged(inner)
        return dataclasses.replace(self, inner=merged)

    def carrying(self, other: Layout) -> AlignedLayout:
        """This layout for a result that keeps the whole trained tensors of another adapter."""
        if not isinstance(other, AlignedLayout):
            return dataclasses.replace(self, inner=self.inner.carrying(other))
        inner = self.inner.carrying(other.inner)
        return dataclasses.replace(self, inner=inner, carried=other.carried)

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """The whole modules of another adapter that whole tensors of this one replace."""
        pieces = set(modules)
        whole = [m for m, t in self.targets.items() if any(name in pieces for name, _ in t.pieces)]
        return self.inner.replaced([self.carried.get(key, key) for key in carried], whole)

    def rebased(self, base: str) -> AlignedLayout:
        """The same layout with another base model on record."""
        return dataclasses.replace(self, inner=self.inner.rebased(base))

    def describe(self) -> dict[str, Any]:
        """What there is to say of the files that are written."""
        return self.inner.describe()

    def plan(self, adapter: Adapter, dtype: torch.dtype | None) -> Plan:
        """What is written of an adapter once its pieces are put together to whole modules.

        Args:
            adapter: The adapter, whose modules are pieces.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The plan.
        """
        return self.inner.plan(self.joined(adapter), dtype)

    def joined(self, adapter: Adapter) -> Adapter:
        """An adapter of whole modules, with the layout of those.

        Args:
            adapter: The adapter, whose modules are pieces.

        Returns:
            The adapter as it is written.

        Raises:
            IncompatibleError: If a module has no name in the convention that is written.
            UnsupportedError: If a carried tensor has none, or no DoRA is such a delta.
        """
        require_representable(adapter.modules)
        known, family = outlines(adapter.modules), _family([adapter])
        places = {name for target in self.targets.values() for name, _ in target.pieces}
        require_places({name: known[name].shape for name in places & known.keys()}, known)
        held = {
            module: target
            for module, target in self.targets.items()
            if any(name in known for name, _ in target.pieces)
        }
        for target in held.values():
            if target.unnamed:
                raise IncompatibleError(target.unnamed)

        def whole(module: str) -> Delta:
            with located(f"module {module!r}"):
                base = self.base.weight(module, held[module].shape, family=family)
                return held[module].joined(adapter.modules, base)

        # which modules share A, and so the ranks, only the values tell
        modules: Mapping[str, Delta]
        if isinstance(adapter.modules, LazyMapping):
            modules = LazyMapping({module: whole(module).outline for module in held}, whole)
        else:
            modules = {module: whole(module) for module in held}
        lost = sorted(adapter.carried.keys() - self.carried.keys())
        if lost:
            raise UnsupportedError(
                "the adapter holds tensors that are not deltas and have no place in the "
                f"convention of the output: {listed(lost)}; write kohya (--format kohya), or leave "
                "them out (devec combine SOURCE --weights 1 --carried-from none)"
            )
        carried = renamed(adapter.carried, self.carried)
        return dataclasses.replace(adapter, modules=modules, carried=carried, layout=self.inner)


def aligned(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Adapters whose modules are named alike, written in the convention of the first.

    Args:
        adapters: Adapters with layouts of this package.

    Returns:
        The adapters themselves if the same modules have the same names in all of them.
    """
    first, *others = (_named(adapter) for adapter in adapters)
    if all(first.same_names(other) for other in others):
        return adapters
    written = first.inner if isinstance(first, AlignedLayout) else first
    return realigned(adapters, written.naming, written.like)


def _named(adapter: Adapter) -> NamedLayout:
    """The layout of an adapter as one with names."""
    layout: Any = adapter.layout
    return layout  # type: ignore[no-any-return]


def realigned(
    adapters: Sequence[Adapter], naming: Naming, build: Build, component: str | None = None
) -> list[Adapter]:
    """Adapters cut into common pieces, to be written in a given convention.

    Args:
        adapters: The adapters.
        naming: How modules are named in the output.
        build: Makes the layout of the output from an adapter and the modules to be written.
        component: Which model's they are, where their names do not say it.

    Returns:
        The adapters, their modules the pieces, their layouts `AlignedLayout`. What cannot be named
        in the convention of the output is refused when it is written.
    """
    family = _family(adapters)
    family_name = family.name if family else _family_name(adapters)
    modules = [m for i, adapter in enumerate(adapters) for m in cut(i, adapter, family, component)]
    require_no_collision(modules, adapters)
    tables = Tables(family, naming, modules, [_named(a).naming.scheme for a in adapters])
    pieces = pieces_of(modules, tables)
    targets = tables.targets(pieces)
    kernels = _kernels(modules, adapters, pieces)
    places = {
        module: (target.shape, next((kernels[n] for n, _ in target.pieces if n in kernels), ()))
        for module, target in targets.items()
    }
    return [
        dataclasses.replace(
            adapter,
            modules=sliced(adapter, [m for m in modules if m.adapter == i], pieces),
            layout=AlignedLayout(
                build(adapter, places, family_name),
                targets,
                kernels,
                _carried_names(adapter, tables),
            ),
        )
        for i, adapter in enumerate(adapters)
    ]


def _family(adapters: Sequence[Adapter]) -> Family | None:
    """The family whose tables all adapters are read by: the one whose own names appear, if any."""
    found = []
    for index, adapter in enumerate(adapters):
        layout = _named(adapter)
        table = TABLES.get(layout.describe().get("family") or "")
        if table is not None:
            found.append((layout.naming.scheme == "diffusers", index, table))
    return min(found)[2]() if found else None


def _family_name(adapters: Sequence[Adapter]) -> str:
    """What the family is called, where there are no tables of it."""
    names = (_named(adapter).describe().get("family") for adapter in adapters)
    return next((name for name in names if name), "")


def _kernels(
    modules: Sequence[Module],
    adapters: Sequence[Adapter],
    pieces: Pieces,
) -> dict[str, tuple[int, ...]]:
    """Piece → kernel, for convolutions."""
    result: dict[str, tuple[int, ...]] = {}
    for module in modules:
        kernel = _named(adapters[module.adapter]).kernel(module.id)
        if kernel:
            name = pieces[module.keys[0]][0]
            known = result.setdefault(name, kernel)
            if spread(known) != spread(kernel):
                raise IncompatibleError(
                    f"module {module.id!r} is a convolution {known} in one adapter and {kernel} in "
                    "another"
                )
    return result


def _carried_names(adapter: Adapter, tables: Tables) -> dict[str, str]:
    """Carried key → key in the output, for those that its readers would know."""
    layout = _named(adapter)
    before, known = layout.naming, {key: key for key in adapter.carried}
    if isinstance(layout, AlignedLayout):
        before, known = layout.inner.naming, dict(layout.carried)
    if tables.naming.same_ids_as(before) and tables.naming.one_model == before.one_model:
        return known
    result: dict[str, str] = {}
    for key in adapter.carried if tables.naming.is_comfy else ():
        module, _, end = key.rpartition(".")
        name = parse_module_id(module)
        parts = segments_of(name, (0, 1), tables.family)
        whole, held, unnamed = tables.whole((name.component, parts[0].name))
        prefix = tables.naming.prefix(name.component, tables.family)
        if key.startswith("bundle_emb."):
            result[key] = key
        elif len(parts) == len(held) == 1 and prefix is not None and not unnamed:
            result[key] = f"{prefix}{whole}.{end}"
    return result
