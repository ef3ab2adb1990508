"""Values that are read when they are asked for, of which the outlines are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """A mapping whose values are made anew whenever they are asked for, and never held.

    Args:
        outlines: Key → what is known of the value without reading it: the same, with tensors on
            the device ``"meta"``, which have shapes and types and no values.
        read: Makes the value of a key.
    """

    def __init__(self, outlines: Mapping[str, T], read: Callable[[str], T]) -> None:
        """Remember how values are read."""
        self.outlines = outlines
        self._read = read

    def __getitem__(self, key: str) -> T:
        if key not in self.outlines:
            raise KeyError(key)
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.outlines

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def outlines(values: Mapping[str, T]) -> Mapping[str, T]:
    """What is known of values without reading them; values in memory are their own outlines."""
    return values.outlines if isinstance(values, LazyMapping) else values


def mapped(values: Mapping[str, T], change: Callable[[str, T], T]) -> Mapping[str, T]:
    """The values changed, now if they are in memory and else when they are read.

    Args:
        values: The values.
        change: From key and value to the new value; of an outline it gives the new outline.

    Returns:
        The new values under the same keys.
    """
    changed = {key: change(key, value) for key, value in outlines(values).items()}
    if not isinstance(values, LazyMapping):
        return changed
    return LazyMapping(changed, lambda key: change(key, values[key]))


def selected(values: Mapping[str, T], keys: Mapping[str, object] | set[str]) -> Mapping[str, T]:
    """The values of some of the keys, in their order, read when those are."""
    held = {key: value for key, value in outlines(values).items() if key in keys}
    return LazyMapping(held, values.__getitem__) if isinstance(values, LazyMapping) else held


def joined(first: Mapping[str, T], second: Mapping[str, T]) -> Mapping[str, T]:
    """The values of two mappings, read when they are asked for if any of them is."""
    if not isinstance(first, LazyMapping) and not isinstance(second, LazyMapping):
        return {**first, **second}
    known = {**outlines(first), **outlines(second)}
    return LazyMapping(known, lambda key: (second if key in second else first)[key])


def renamed(values: Mapping[str, T], names: Mapping[str, str]) -> Mapping[str, T]:
    """The values under other keys."""
    known = {names[key]: value for key, value in outlines(values).items()}
    if not isinstance(values, LazyMapping):
        return known
    before = {names[key]: key for key in values}
    return LazyMapping(known, lambda key: values[before[key]])
