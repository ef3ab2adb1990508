"""Cutting modules into the slices that several conventions have in common.

A *segment* is a run of rows that no convention splits further; a *slice* is one or more segments
that every adapter and the output store together, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from devec.adapters.alignment.dora import rows_of, sliceable
from devec.adapters.alignment.joining import Target
from devec.adapters.data import AdapterData
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, located
from devec.lazy import LazyMapping, outlines
from devec.naming.conventions import Naming, diffusers_naming
from devec.naming.families import Family, Segment, flat
from devec.naming.module_id import DENOISERS, ModuleId, parse_module_id
from devec.naming.tables import dotted_names, segments_of, text_encoders

SegmentKey = tuple[str, str]  # component, and name of the segment
Slices = Mapping[SegmentKey, tuple[str, tuple[SegmentKey, ...]]]  # → name and segments of its slice


@dataclass(frozen=True)
class SourceModule:
    """A module of an adapter, with its segments.

    Attributes:
        adapter: Index of the adapter.
        id: Name of the module in the adapter.
        name: The parsed name.
        segments: The segments, in the order of the rows.
        shape: Shape (out, in) of the weight.
    """

    adapter: int
    id: str
    name: ModuleId
    segments: tuple[Segment, ...]
    shape: tuple[int, int]

    @property
    def keys(self) -> tuple[SegmentKey, ...]:
        """The keys of its segments."""
        return tuple((self.name.component, segment.name) for segment in self.segments)

    @property
    def rows(self) -> list[int]:
        """Number of rows of each segment."""
        sizes = [segment.size for segment in self.segments]
        unit, rest = divmod(self.shape[0], sum(sizes))
        if rest:
            raise IncompatibleError(
                f"module {self.id!r} has {self.shape[0]} rows, which cannot be "
                f"{len(sizes)} parts in the ratio of {sizes}"
            )
        return [unit * size for size in sizes]


def cut(
    index: int, adapter: AdapterData, family: Family | None, component: str | None = None
) -> list[SourceModule]:
    """The modules of an adapter with their segments; all of one component, if one is given."""
    result = []
    for module, delta in outlines(adapter.modules).items():
        name = parse_module_id(module)
        if component is not None:
            name = dataclasses.replace(name, component=component)
        segments = segments_of(name, delta.shape, family)
        result.append(SourceModule(index, module, name, segments, delta.shape))
    return result


def require_no_collision(modules: Sequence[SourceModule], adapters: Sequence[AdapterData]) -> None:
    """Refuse adapters in which one module has two names."""
    seen: dict[tuple[int, SegmentKey], SourceModule] = {}
    for module in modules:
        for key in module.keys:
            other = seen.setdefault((module.adapter, key), module)
            if other is not module:
                raise IncompatibleError(
                    f"{adapters[module.adapter].label} has two names for one module: {other.id!r} "
                    f"and {module.id!r}"
                )


class OutputNames:
    """The names of the output's modules.

    Args:
        family: The tables of the base model's family.
        naming: How modules are named in the output.
        modules: The modules of all adapters, which tell names and sizes that no table has.
        schemes: The scheme of names of each adapter.
    """

    def __init__(
        self,
        family: Family | None,
        naming: Naming,
        modules: Sequence[SourceModule],
        schemes: Sequence[str],
    ) -> None:
        """Collect names and sizes from the adapters."""
        self.family = family
        self.naming = naming
        self.dotted: dict[SegmentKey, str] = {}
        self.flat = {key for module in modules if module.name.flat for key in module.keys}
        self.rows: dict[SegmentKey, int] = {}
        self.columns: dict[SegmentKey, int] = {}
        for module in modules:
            for key, rows in zip(module.keys, module.rows, strict=True):
                self.rows.setdefault(key, rows)
                self.columns.setdefault(key, module.shape[1])
            # a module that no table has may have any name in another scheme
            alike = family is None or schemes[module.adapter] == naming.scheme
            if len(module.keys) == 1 and not module.name.flat and alike:
                self.dotted.setdefault(module.keys[0], module.name.current_path)

    def whole(self, key: SegmentKey) -> tuple[str, tuple[Segment, ...], str]:
        """The module of the output that a segment belongs to.

        Returns:
            Its name, spelled as in the output and without prefix; its segments in order; and why
            it cannot be written, empty if it can.
        """
        component, segment = key
        table = self.family if component in DENOISERS else text_encoders()
        scheme = self.naming.scheme if component in DENOISERS else "diffusers"
        known = table.module(segment, scheme) if table else ""
        if table is None or not known:
            name, unnamed = self._unknown(key, table)
            return name, (Segment(segment),), unnamed
        whole = segment.partition(":")[0]
        rows, columns = self.rows.get(key, 0), self.columns.get(key, 0)
        shape = (rows * (2 if whole != segment else 1), columns)
        segments = table.segments(flat(known), shape)
        return (flat(known) if self.naming.flat else known), segments, ""

    def _unknown(self, key: SegmentKey, table: Family | None) -> tuple[str, str]:
        """The name of a module that no table has, and why it cannot be written, if so."""
        _, name = key
        elsewhere = table is not None and bool(table.module(name, "diffusers"))
        if self.naming.flat and (key in self.flat or not (table is None or elsewhere)):
            return flat(name), ""
        if self.naming.flat and table is None:
            return flat(name), (
                f"the base model of module {name!r} is not known, so neither is what kohya's "
                "trainers call it; name the base model (--base MODEL, e.g. FLUX.1-dev)"
            )
        if key in self.dotted and not (self.naming.scheme != "diffusers" and elsewhere):
            return self.dotted[key], ""
        if table is None and name in dotted_names():
            return dotted_names()[name], ""
        return name, (
            f"module {name!r} has no name in the convention of the output: it has none for this "
            "layer, or which of its underscores stand for dots cannot be determined. Write "
            "another format (--format), or name an adapter of another convention first"
        )

    def targets(self, slices: Slices) -> dict[str, Target]:
        """The modules of the output by name, in the order of their slices."""
        result: dict[str, Target] = {}
        for key in slices:
            name, segments, unnamed = self.whole(key)
            prefix = self.naming.prefix(key[0], self.family)
            if prefix is None:
                unnamed = (
                    "PEFT's format, that of the first adapter, is for adapters of one model, "
                    f"but {name!r} is of another ({key[0] or 'the denoiser'}). Write another "
                    "format (--format kohya or diffusers), or name one of another format first"
                )
            module = (prefix or "") + name
            if module in result:
                continue
            unit = self.rows[key] // next(s.size for s in segments if s.name == key[1])
            rows: dict[str, int] = {}
            for segment in segments:
                absent = (f"{segment.name} (zero)", ())
                slice_name = slices.get((key[0], segment.name), absent)[0]
                rows[slice_name] = rows.get(slice_name, 0) + unit * segment.size
            shape = (sum(rows.values()), self.columns[key])
            result[module] = Target(tuple(rows.items()), shape, unnamed)
        return result


def slices_of(modules: Sequence[SourceModule], output: OutputNames) -> Slices:
    """Segment → its slice: all segments that every adapter and the output store together."""
    groups: dict[SegmentKey, set[tuple[SegmentKey, ...]]] = {}
    for module in modules:
        for key in module.keys:
            _, segments, _ = output.whole(key)
            whole = tuple((key[0], segment.name) for segment in segments)
            groups.setdefault(key, set()).update({module.keys, whole})
    result: dict[SegmentKey, tuple[str, tuple[SegmentKey, ...]]] = {}
    for key, stored in groups.items():
        together = next(iter(stored)) if len(stored) == 1 else (key,)
        name = _fused_name(together, output)
        if not name or any(groups.get(other, stored) != stored for other in together):
            together, name = (key,), _canonical(key, output)
        result[key] = (name, together)
    return result


def _fused_name(keys: tuple[SegmentKey, ...], output: OutputNames) -> str:
    """The name of the module that consists of these segments; empty if there is none."""
    names = tuple(name for _, name in keys)
    for scheme in ("native", "xlabs") if len(keys) > 1 and output.family else ():
        module = output.family.module(names[0], scheme) if output.family else ""
        segments = output.family.native.get(module, ()) if output.family else ()
        if tuple(segment.name for segment in segments) == names:
            return module
    return ""


def _canonical(key: SegmentKey, output: OutputNames) -> str:
    """The name of a slice of one segment: as in diffusers, or as in the adapters."""
    component, name = key
    prefix = diffusers_naming(output.family, [component]).prefixes[component]
    return (prefix if component else "") + output.dotted.get(key, name)


def sliced(
    adapter: AdapterData, modules: Sequence[SourceModule], slices: Slices
) -> Mapping[str, Delta]:
    """Name of a slice → delta of an adapter: rows of B and of magnitudes, with A shared."""
    known, rows_in = outlines(adapter.modules), _rows_of_slices(modules, slices)

    def delta_of(name: str, whole: Mapping[str, Delta]) -> Delta:
        module, rows = rows_in[name]
        if rows is None:
            return whole[module]
        with located(f"module {module!r} of {adapter.label}"):
            return rows_of(sliceable(whole[module]), rows.start, rows.stop)

    # slicing a DoRA may read a base weight
    if not isinstance(adapter.modules, LazyMapping) or any(
        d.gain is not None for d in known.values()
    ):
        loaded = dict(adapter.modules)
        return {name: delta_of(name, loaded) for name in rows_in}
    outlined = {name: delta_of(name, known) for name in rows_in}
    return LazyMapping(outlined, lambda name: delta_of(name, adapter.modules))


def _rows_of_slices(
    modules: Sequence[SourceModule], slices: Slices
) -> dict[str, tuple[str, slice | None]]:
    """Name of a slice → the module that contains it, and its rows; None for all rows."""
    result: dict[str, tuple[str, slice | None]] = {}
    for module in modules:
        start = 0
        for key, rows in zip(module.keys, module.rows, strict=True):
            name, together = slices[key]
            whole = len(together) > 1 or len(module.keys) == 1
            result[name] = module.id, None if whole else slice(start, start + rows)
            start += 0 if whole else rows
    return result
