"""Cutting modules into the pieces that several conventions have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from devec.adapters.adapter import Adapter
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, located
from devec.formats.alignment.dora import rows_of, sliceable
from devec.formats.alignment.joining import Target
from devec.lazy import LazyMapping, outlines
from devec.naming.conventions import Naming, diffusers_naming
from devec.naming.families import Family, Segment, flat
from devec.naming.module_id import DENOISERS, ModuleId, parse_module_id
from devec.naming.tables import dotted_names, segments_of, text_encoders

Key = tuple[str, str]  # component and part

Pieces = Mapping[
    Key, tuple[str, tuple[Key, ...]]
]  # part → the name of its piece, and all its parts


@dataclass(frozen=True)
class Module:
    """A module of an adapter, cut into parts."""

    adapter: int
    id: str
    name: ModuleId
    parts: tuple[Segment, ...]
    shape: tuple[int, int]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of its parts."""
        return tuple((self.name.component, part.name) for part in self.parts)

    @property
    def rows(self) -> list[int]:
        """Rows of its parts."""
        unit, rest = divmod(self.shape[0], sum(part.size for part in self.parts))
        if rest:
            raise IncompatibleError(
                f"module {self.id!r} has {self.shape[0]} rows, which cannot be "
                f"{len(self.parts)} parts in the ratio of {[part.size for part in self.parts]}"
            )
        return [unit * part.size for part in self.parts]


def cut(
    index: int, adapter: Adapter, family: Family | None, component: str | None = None
) -> list[Module]:
    """The modules of an adapter with their parts.

    Args:
        index: Which of the adapters it is.
        adapter: The adapter.
        family: The tables of the base model's family.
        component: Which model's they are, where their names do not say it.

    Returns:
        A row per module.
    """
    result = []
    for module, delta in outlines(adapter.modules).items():
        name = parse_module_id(module)
        if component is not None:
            name = dataclasses.replace(name, component=component)
        parts = segments_of(name, delta.shape, family)
        result.append(Module(index, module, name, parts, delta.shape))
    return result


def require_no_collision(modules: Sequence[Module], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters two of whose modules are the same one under other names.

    Args:
        modules: The modules of all adapters.
        adapters: The adapters.

    Raises:
        IncompatibleError: If there are such modules.
    """
    seen: dict[tuple[int, Key], Module] = {}
    for module in modules:
        for key in module.keys:
            other = seen.setdefault((module.adapter, key), module)
            if other is not module:
                raise IncompatibleError(
                    f"{adapters[module.adapter].label} has two names for one module: {other.id!r} "
                    f"and {module.id!r}"
                )


class Tables:
    """The names of the output."""

    def __init__(
        self,
        family: Family | None,
        naming: Naming,
        modules: Sequence[Module],
        schemes: Sequence[str],
    ) -> None:
        """Collect what the adapters themselves say of names and sizes.

        Args:
            family: The tables of the base model's family.
            naming: How modules are named in the output.
            modules: The modules of all adapters.
            schemes: The scheme of names of each adapter.
        """
        self.family = family
        self.naming = naming
        self.dotted: dict[Key, str] = {}
        self.flat = {key for module in modules if module.name.flat for key in module.keys}
        self.rows: dict[Key, int] = {}
        self.columns: dict[Key, int] = {}
        for module in modules:
            for key, rows in zip(module.keys, module.rows, strict=True):
                self.rows.setdefault(key, rows)
                self.columns.setdefault(key, module.shape[1])
            # by other authors' names a module that no table has may be called anything
            alike = family is None or schemes[module.adapter] == naming.scheme
            if len(module.keys) == 1 and not module.name.flat and alike:
                self.dotted.setdefault(module.keys[0], module.name.current_path)

    def whole(self, key: Key) -> tuple[str, tuple[Segment, ...], str]:
        """The module of the output that a part belongs to, and its parts.

        Returns:
            Its name, without prefix and as the output spells it; its parts in order; and why it
            cannot be written, if it cannot.
        """
        component, part = key
        table = self.family if component in DENOISERS else text_encoders()
        scheme = self.naming.scheme if component in DENOISERS else "diffusers"
        known = table.module(part, scheme) if table else ""
        if table is None or not known:
            name, unnamed = self._unknown(key, table)
            return name, (Segment(part),), unnamed
        whole = part.partition(":")[0]
        rows, columns = self.rows.get(key, 0), self.columns.get(key, 0)
        shape = (rows * (2 if whole != part else 1), columns)
        parts = table.segments(flat(known), shape)
        return (flat(known) if self.naming.flat else known), parts, ""

    def _unknown(self, key: Key, table: Family | None) -> tuple[str, str]:
        """The name of a module that no table has, and why it cannot be used, if it cannot."""
        _, part = key
        elsewhere = table is not None and bool(table.module(part, "diffusers"))
        if self.naming.flat and (key in self.flat or not (table is None or elsewhere)):
            return flat(part), ""
        if self.naming.flat and table is None:
            return flat(part), (
                f"the base model of module {part!r} is not known, so neither is what kohya's "
                "trainers call it; name the base model (--base MODEL, e.g. FLUX.1-dev)"
            )
        if key in self.dotted and not (self.naming.scheme != "diffusers" and elsewhere):
            return self.dotted[key], ""
        if table is None and part in dotted_names():
            return dotted_names()[part], ""
        return part, (
            f"module {part!r} has no name in the convention of the output: it has none for this "
            "layer, or which of its underscores stand for dots cannot be told. Write another "
            "format (--format), or name an adapter of another convention first"
        )

    def targets(self, pieces: Pieces) -> dict[str, Target]:
        """The modules of the output, in the order in which their pieces come.

        Args:
            pieces: The pieces of all adapters.

        Returns:
            Id in the output → what it is made of.
        """
        result: dict[str, Target] = {}
        for key in pieces:
            name, parts, unnamed = self.whole(key)
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
            unit = self.rows[key] // next(p.size for p in parts if p.name == key[1])
            held: dict[str, int] = {}
            for part in parts:
                piece = pieces.get((key[0], part.name), (f"{part.name} (zero)", ()))[0]
                held[piece] = held.get(piece, 0) + unit * part.size
            shape = (sum(held.values()), self.columns[key])
            result[module] = Target(tuple(held.items()), shape, unnamed)
        return result


def pieces_of(modules: Sequence[Module], tables: Tables) -> Pieces:
    """Part → the piece it is in: its name and all the parts of it.

    Parts stay together where every adapter and the output hold them together in one order.

    Args:
        modules: The modules of all adapters.
        tables: The names of the output.

    Returns:
        The pieces, in the order in which their modules come.
    """
    groups: dict[Key, set[tuple[Key, ...]]] = {}
    for module in modules:
        for key in module.keys:
            _, parts, _ = tables.whole(key)
            whole = tuple((key[0], part.name) for part in parts)
            groups.setdefault(key, set()).update({module.keys, whole})
    result: dict[Key, tuple[str, tuple[Key, ...]]] = {}
    for key, held in groups.items():
        together = next(iter(held)) if len(held) == 1 else (key,)
        name = _fused_name(together, tables)
        if not name or any(groups.get(other, held) != held for other in together):
            together, name = (key,), _canonical(key, tables)
        result[key] = (name, together)
    return result


def _fused_name(keys: tuple[Key, ...], tables: Tables) -> str:
    """The name of the module that consists of several parts, empty if there is none."""
    parts = tuple(part for _, part in keys)
    for scheme in ("native", "xlabs") if len(keys) > 1 and tables.family else ():
        name = tables.family.module(parts[0], scheme) if tables.family else ""
        found = tables.family.native.get(name, ()) if tables.family else ()
        if tuple(part.name for part in found) == parts:
            return name
    return ""


def _canonical(key: Key, tables: Tables) -> str:
    """The name of a piece: as diffusers has it, or as the adapters do."""
    component, part = key
    prefix = diffusers_naming(tables.family, [component]).prefixes[component]
    return (prefix if component else "") + tables.dotted.get(key, part)


def sliced(
    adapter: Adapter,
    modules: Sequence[Module],
    pieces: Pieces,
) -> Mapping[str, Delta]:
    """Piece → delta: rows of B and of magnitudes, A shared.

    Args:
        adapter: The adapter.
        modules: Its modules.
        pieces: The pieces.

    Returns:
        The modules of the adapter in terms of pieces.
    """
    known, places = outlines(adapter.modules), _rows_of_pieces(modules, pieces)

    def piece(name: str, held: Mapping[str, Delta]) -> Delta:
        module, rows = places[name]
        if rows is None:
            return held[module]
        with located(f"module {module!r} of {adapter.label}"):
            return rows_of(sliceable(held[module]), rows.start, rows.stop)

    # rows of DoRAs may take a base weight to know
    if not isinstance(adapter.modules, LazyMapping) or any(
        d.gain is not None for d in known.values()
    ):
        held = dict(adapter.modules)
        return {name: piece(name, held) for name in places}
    return LazyMapping(
        {name: piece(name, known) for name in places}, lambda n: piece(n, adapter.modules)
    )


def _rows_of_pieces(
    modules: Sequence[Module], pieces: Pieces
) -> dict[str, tuple[str, slice | None]]:
    """Piece → the module that it is part of, and which rows of it; None for all."""
    result: dict[str, tuple[str, slice | None]] = {}
    for module in modules:
        start = 0
        for key, rows in zip(module.keys, module.rows, strict=True):
            name, together = pieces[key]
            whole = len(together) > 1 or len(module.keys) == 1
            result[name] = module.id, None if whole else slice(start, start + rows)
            start += 0 if whole else rows
    return result
