"""Families of base models: the names of their modules by their authors and in diffusers.

One module of the authors may be several modules in diffusers: Flux' ``qkv`` is three layers there.
The rows of a module that neither splits further are a *segment*, named after its module in
diffusers. The tables (`devec.naming.tables`) list every name, so names are looked up, never
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

NativeNames = dict[str, "tuple[Segment, ...]"]

# More blocks than any known model has.
MOST_BLOCKS = 100


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a module.

    Attributes:
        name: Name in diffusers; with ``:scale`` or ``:shift`` for half of a module.
        size: Number of rows relative to the other segments of the module.
    """

    name: str
    size: int = 1


@dataclass(frozen=True)
class Family:
    """The module names of a family of base models.

    Attributes:
        name: Name of the family.
        native: Dotted name by the authors → segments, in the order of the rows.
        diffusers_names: Dotted names in diffusers.
        kohya_native: Whether kohya's trainers use the authors' names.
        swapped: Authors' names of the modules of shape (2·n, n) whose halves diffusers swaps.
    """

    name: str
    native: NativeNames
    diffusers_names: frozenset[str]
    kohya_native: bool = True
    swapped: frozenset[str] = frozenset()

    def segments(self, name: str, shape: tuple[int, int]) -> tuple[Segment, ...]:
        """Segments of a module by its flat name, in the order of its rows; itself if unknown."""
        name, _, half = name.partition(":")
        if half:
            return (Segment(f"{self._by_flat_name.get(name, (name, False))[0]}:{half}"),)
        module, native = self._by_flat_name.get(name, (name, False))
        segments = self.native[module] if native else (Segment(module),)
        halved = segments[0].name in self._halved and shape[0] == 2 * shape[1]
        if not halved:
            return segments
        halves = (Segment(f"{segments[0].name}:scale"), Segment(f"{segments[0].name}:shift"))
        return halves[::-1] if native else halves

    def module(self, segment: str, scheme: str) -> str:
        """Dotted name of a segment's module in the scheme of a `Naming`; empty if it has none."""
        whole = segment.partition(":")[0]
        if scheme == "diffusers":
            return whole if whole in self.diffusers_names else ""
        return self._by_segment[scheme].get(whole, "")

    @cached_property
    def _by_flat_name(self) -> dict[str, tuple[str, bool]]:
        """Flat name → dotted name, and whether it is the authors' name."""
        names = {flat(name): (name, False) for name in self.diffusers_names}
        return names | {flat(name): (name, True) for name in self.native}

    @cached_property
    def _halved(self) -> frozenset[str]:
        """Names in diffusers of the modules with swapped halves."""
        return frozenset(self.native[name][0].name for name in self.swapped)

    @cached_property
    def _by_segment(self) -> dict[str, dict[str, str]]:
        """Scheme → segment → the authors' first module that contains it."""
        modules: dict[str, dict[str, str]] = {"native": {}, "xlabs": {}}
        for module, segments in self.native.items():
            scheme = "xlabs" if ".processor." in module else "native"
            for segment in segments:
                modules[scheme].setdefault(segment.name, module)
        return modules


def flat(name: str) -> str:
    """A dotted name with underscores for dots, as kohya's trainers write it."""
    return name.replace(".", "_")


def prefixed_names(table: Mapping[str, str], native: str = "", diffusers: str = "") -> NativeNames:
    """The names of a table under the prefixes of a block.

    Args:
        table: Authors' name → names in diffusers: ``"q k v"`` are three segments, ``"mlp*4"`` is
            one with four times the rows.
        native: Prefix of the authors' names.
        diffusers: Prefix of the names in diffusers.

    Returns:
        Authors' name → segments.
    """
    result: NativeNames = {}
    for name, segments in table.items():
        sized = (segment.partition("*") for segment in segments.split())
        result[native + name] = tuple(
            Segment(diffusers + segment, int(size or 1)) for segment, _, size in sized
        )
    return result


def native_family(
    name: str, native: NativeNames, *, kohya_native: bool = True, swapped: str = "(?!)"
) -> Family:
    """A family whose diffusers names all have an authors' name; `swapped` is a pattern of those."""
    names = frozenset(segment.name for segments in native.values() for segment in segments)
    halves = frozenset(n for n in native if re.fullmatch(swapped, n))
    return Family(name, native, names, kohya_native, halves)
