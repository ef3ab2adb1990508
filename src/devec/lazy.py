"""Mappings whose values are read on access, while their outlines are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """A mapping that reads a value on every access and never stores it.

    Args:
        outlines: Key → outline: the value with meta tensors, which have shapes and dtypes only.
        read: From a key to its value.
    """

    def __init__(self, outlines: Mapping[str, T], read: Callable[[str], T]) -> None:
        """Store the outlines and the reader."""
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
    """The outlines of lazy values; values in memory are their own outlines."""
    return values.outlines if isinstance(values, LazyMapping) else values


def mapped(values: Mapping[str, T], change: Callable[[str, T], T]) -> Mapping[str, T]:
    """Values changed by a function of key and value (or outline), lazily if they are lazy."""
    changed = {key: change(key, value) for key, value in outlines(values).items()}
    if not isinstance(values, LazyMapping):
        return changed
    return LazyMapping(changed, lambda key: change(key, values[key]))


def selected(values: Mapping[str, T], keys: Mapping[str, object] | set[str]) -> Mapping[str, T]:
    """The values whose key is among `keys`, in their own order, lazily if they are lazy."""
    kept = {key: value for key, value in outlines(values).items() if key in keys}
    return LazyMapping(kept, values.__getitem__) if isinstance(values, LazyMapping) else kept


def joined(first: Mapping[str, T], second: Mapping[str, T]) -> Mapping[str, T]:
    """The values of two mappings, lazily if one is lazy; the second takes precedence."""
    if not isinstance(first, LazyMapping) and not isinstance(second, LazyMapping):
        return {**first, **second}
    both = {**outlines(first), **outlines(second)}
    return LazyMapping(both, lambda key: (second if key in second else first)[key])


def renamed(values: Mapping[str, T], names: Mapping[str, str]) -> Mapping[str, T]:
    """The values under new keys, lazily if they are lazy; `names` maps old keys to new ones."""
    new = {names[key]: value for key, value in outlines(values).items()}
    if not isinstance(values, LazyMapping):
        return new
    old_keys = {names[key]: key for key in values}
    return LazyMapping(new, lambda key: values[old_keys[key]])
