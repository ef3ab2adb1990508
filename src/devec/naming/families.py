"""How the modules of known base models are named by their authors and by diffusers.

A module of one naming may be several of the other: Flux' ``qkv`` is three layers in diffusers.
What neither splits further is a *segment*, named after its module in diffusers. The tables list
every name outright (`devec.formats.tables`), so that a name is looked up and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Names = dict[str, "tuple[Segment, ...]"]


@dataclass(frozen=True)
class Segment:
    """Rows of a module that no naming splits further.

    Attributes:
        name: Name in diffusers; with ``:scale`` or ``:shift`` for half a module.
        size: Relative number of rows within its module.
    """

    name: str
    size: int = 1


@dataclass(frozen=True)
class Family:
    """The names of a family of base models.

    Attributes:
        name: What the family is called.
        native: Dotted name by the model's authors → parts, in the order of the rows.
        own: Dotted names in diffusers.
        native_files: Whether kohya's trainers use the authors' names for it.
        swapped: Authors' names of modules of shape (2·n, n) whose halves diffusers swaps.
    """

    name: str
    native: Names
    own: frozenset[str]
    native_files: bool = True
    swapped: frozenset[str] = frozenset()

    def parts(self, name: str, shape: tuple[int, int]) -> tuple[Segment, ...]:
        """What a module is made of.

        Args:
            name: Flat name of the module, by its authors or in diffusers, or of half of one.
            shape: Shape (out, in) of its weight.

        Returns:
            Its parts in the order of its rows; itself, if it is not known or not split.
        """
        name, _, half = name.partition(":")
        if half:
            return (Segment(f"{self._by_flat_name.get(name, (name, False))[0]}:{half}"),)
        module, native = self._by_flat_name.get(name, (name, False))
        parts = self.native[module] if native else (Segment(module),)
        halved = parts[0].name in self._halved and shape[0] == 2 * shape[1]
        if not halved:
            return parts
        halves = (Segment(f"{parts[0].name}:scale"), Segment(f"{parts[0].name}:shift"))
        return halves[::-1] if native else halves

    def module(self, part: str, scheme: str) -> str:
        """The module that a part belongs to in a scheme of names.

        Args:
            part: Name of the part.
            scheme: ``"native"``, ``"xlabs"`` or ``"diffusers"``.

        Returns:
            The dotted name; empty if the scheme has none for it.
        """
        whole = part.partition(":")[0]
        if scheme == "diffusers":
            return whole if whole in self.own else ""
        return self._by_part[scheme].get(whole, "")

    @cached_property
    def _by_flat_name(self) -> dict[str, tuple[str, bool]]:
        """Flat name → dotted name, and whether it is one by the model's authors."""
        own = {flat(name): (name, False) for name in self.own}
        return own | {flat(name): (name, True) for name in self.native}

    @cached_property
    def _halved(self) -> frozenset[str]:
        """Names in diffusers of the modules whose halves are swapped."""
        return frozenset(self.native[name][0].name for name in self.swapped)

    @cached_property
    def _by_part(self) -> dict[str, dict[str, str]]:
        """Scheme → part → the authors' module it is in; the first where several hold it."""
        found: dict[str, dict[str, str]] = {"native": {}, "xlabs": {}}
        for module, parts in self.native.items():
            scheme = "xlabs" if ".processor." in module else "native"
            for part in parts:
                found[scheme].setdefault(part.name, module)
        return found


def flat(name: str) -> str:
    """A dotted name as kohya's trainers write it."""
    return name.replace(".", "_")


def names_below(table: Mapping[str, str], native: str = "", own: str = "") -> Names:
    """The names of a block's modules.

    Args:
        table: Native name → names in diffusers: ``"q k v"`` are three parts, ``"mlp*4"`` is one of
            four times the rows.
        native: What stands before the native names.
        own: What stands before those in diffusers.

    Returns:
        Native name → parts.
    """
    result: Names = {}
    for name, parts in table.items():
        sized = (part.partition("*") for part in parts.split())
        result[native + name] = tuple(
            Segment(own + part, int(size or 1)) for part, _, size in sized
        )
    return result


def family(name: str, native: Names, *, native_files: bool = True, swapped: str = "(?!)") -> Family:
    """A family all of whose names have a native form.

    Args:
        name: What the family is called.
        native: Native name → parts.
        native_files: Whether kohya's trainers use the native names.
        swapped: Pattern of the native names of modules whose halves diffusers swaps.

    Returns:
        The family.
    """
    own = frozenset(part.name for parts in native.values() for part in parts)
    halves = frozenset(n for n in native if re.fullmatch(swapped, n))
    return Family(name, native, own, native_files, halves)
