"""The layout of aligned adapters, which joins slices and hands whole modules to another layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.adapters.alignment.joining import Target
from devec.adapters.data import AdapterT
from devec.adapters.layout import (
    About,
    Contents,
    Layout,
    ModuleNames,
    ModuleShapes,
    Plan,
    require_shapes_fit,
)
from devec.base_model.model import BaseModel
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.errors import IncompatibleError, UnsupportedError, listed, located
from devec.lazy import LazyMapping, outlines, renamed
from devec.naming.conventions import Naming
from devec.naming.families import Family
from devec.naming.tables import TABLES


@dataclass(frozen=True)
class AlignedLayout:
    """The layout of an adapter whose modules are slices.

    Attributes:
        inner: The layout of the whole modules.
        targets: Whole module → the slices that make it up.
        kernels: Slice → kernel.
        carried: Key of a carried tensor → its key in the output.
    """

    inner: Layout
    targets: Mapping[str, Target]
    kernels: Mapping[str, tuple[int, ...]]
    carried: Mapping[str, str]

    joins = True

    @property
    def names(self) -> ModuleNames:
        """Names of slices: those of diffusers or of the output, without prefixes."""
        inner = self.inner.names
        return ModuleNames(Naming({}, flat=False, scheme=inner.naming.scheme), inner.family)

    @property
    def about(self) -> About:
        """What the files that are written will say."""
        return self.inner.about

    @property
    def base(self) -> BaseModel:
        """The base model that was given with the adapter."""
        return self.inner.base

    @property
    def suffix(self) -> str:
        """Suffix of output paths."""
        return self.inner.suffix

    @property
    def dtype(self) -> torch.dtype:
        """The most frequent storage type of the factors."""
        return self.inner.dtype

    def stored_type(self, module: str) -> torch.dtype:  # noqa: ARG002
        """The storage type of a slice."""
        return self.inner.dtype

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a slice."""
        return self.kernels.get(module, ())

    def like(
        self, other: Layout, modules: Mapping[str, Delta], shapes: ModuleShapes, family: str
    ) -> Layout:
        """A layout of the convention that is written, for another adapter."""
        return self.inner.like(other, modules, shapes, family)

    def merged(self, others: Sequence[Layout]) -> AlignedLayout:
        """The layout of a combination of adapters that were aligned together."""
        inner = [other.inner for other in others if isinstance(other, AlignedLayout)]
        return dataclasses.replace(self, inner=self.inner.merged(inner))

    def carrying(self, other: Layout) -> AlignedLayout:
        """The layout of a result that keeps the carried tensors of another adapter."""
        if not isinstance(other, AlignedLayout):
            return dataclasses.replace(self, inner=self.inner.carrying(other))
        inner = self.inner.carrying(other.inner)
        return dataclasses.replace(self, inner=inner, carried=other.carried)

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """The whole modules of another adapter that carried tensors of this one replace."""
        changed = set(modules)
        whole = [m for m, t in self.targets.items() if any(name in changed for name, _ in t.slices)]
        return self.inner.replaced([self.carried.get(key, key) for key in carried], whole)

    def rebased(self, base: str) -> AlignedLayout:
        """The same layout with another base model on record."""
        return dataclasses.replace(self, inner=self.inner.rebased(base))

    def plan(self, contents: Contents, dtype: torch.dtype | None) -> Plan:
        """What will be written once the slices are joined to whole modules."""
        modules, carried = self._whole(contents.modules, contents.carried)
        whole = dataclasses.replace(contents, modules=modules, carried=carried)
        return self.inner.plan(whole, dtype)

    def joined(self, adapter: AdapterT) -> AdapterT:
        """An adapter with slices, as an adapter with whole modules and their layout.

        Args:
            adapter: The adapter, whose modules are slices.

        Returns:
            The adapter as it is written.

        Raises:
            IncompatibleError: If a module has no name in the convention that is written.
            UnsupportedError: If a carried tensor has no key there, or slices are DoRAs that no
                single DoRA represents.
        """
        modules, carried = self._whole(adapter.modules, adapter.carried)
        return dataclasses.replace(adapter, modules=modules, carried=carried, layout=self.inner)

    def _whole(
        self, modules: Mapping[str, Delta], carried: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Delta], Mapping[str, Tensor]]:
        """Whole modules and carried tensors, under the names and keys of the output."""
        require_representable(modules)
        known = outlines(modules)
        names = {name for target in self.targets.values() for name, _ in target.slices}
        require_shapes_fit({name: known[name].shape for name in names & known.keys()}, known)
        present = {
            module: target
            for module, target in self.targets.items()
            if any(name in known for name, _ in target.slices)
        }
        for target in present.values():
            if target.unnamed:
                raise IncompatibleError(target.unnamed)
        lost = sorted(carried.keys() - self.carried.keys())
        whole = self._joined_modules(modules, present)
        if lost:
            raise UnsupportedError(
                "the adapter holds tensors that are not deltas and have no place in the "
                f"convention of the output: {listed(lost)}; write kohya (--format kohya), or leave "
                "them out (devec combine SOURCE --weights 1 --carried-from none)"
            )
        return whole, renamed(carried, self.carried)

    def _joined_modules(
        self, modules: Mapping[str, Delta], present: Mapping[str, Target]
    ) -> Mapping[str, Delta]:
        """Whole module → delta, joined on access if the slices are lazy."""
        table = TABLES.get(self.inner.names.family)
        family: Family | None = table() if table else None

        def whole(module: str) -> Delta:
            with located(f"module {module!r}"):
                base = self.base.weight(module, present[module].shape, family=family)
                return present[module].joined(modules, base)

        # which slices share A, and so the ranks, depends on their values
        if isinstance(modules, LazyMapping):
            return LazyMapping({module: whole(module).outline for module in present}, whole)
        return {module: whole(module) for module in present}
