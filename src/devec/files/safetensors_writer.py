"""Writing safetensors files, one tensor at a time, in any order, from any process.

The bytes of a file depend on nothing but what is in it. The safetensors library writes the same
tensors with the metadata in another order each time, and wants all of them at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from devec.errors import OutputError, listed
from devec.files.random_access import BINARY, bytes_of, read_at, uncache, write_at
from devec.files.safetensors_reader import SAFETENSORS_TYPES

_CHUNK = 1 << 22
_LARGE = 1 << 20


class _Slot(NamedTuple):
    """Where a tensor goes, counted from the end of the header."""

    start: int
    stop: int
    outline: Tensor


class TensorWriter:
    """A safetensors file in the making.

    Every tensor has its place from the beginning, so that tensors may come in any order and from
    several processes, each with a writer of its own.

    Args:
        path: The file.
        known: Key → outline of the tensor: its type and shape.
        strings: The header's strings.
        create: Whether the file is made; otherwise another writer has made it.

    Raises:
        OutputError: If what another writer has made is another file.
    """

    def __init__(
        self, path: Path, known: Mapping[str, Tensor], strings: Mapping[str, str], *, create: bool
    ) -> None:
        """Make the file, as large as it will be."""
        self._slots = _placed(known)
        header = _header(self._slots, strings)
        self._header_size, self._strings = len(header), strings
        end = max((slot.stop for slot in self._slots.values()), default=0)
        self._missing = set(self._slots)
        self._cached: list[_Slot] = []  # large ones that lie in the system's cache
        flags = BINARY | os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if create:
                os.ftruncate(self._file, len(header) + end)
                self._write(header, 0)
            else:
                self._require_same(header, len(header) + end)
        except (OSError, OutputError):
            self.close()
            raise

    def _require_same(self, header: bytes, size: int) -> None:
        """Refuse to write to a file whose tensors have other places."""
        found = memoryview(bytearray(len(header)))
        if os.fstat(self._file).st_size != size or read_at(self._file, found, 0) < len(header):
            found = found[:0]
        if found != header:
            raise OutputError(
                "another process plans this output otherwise; give all processes the same options, "
                "base models and libraries"
            )

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor.

        Args:
            key: Its key.
            tensor: The tensor, on the CPU.

        Raises:
            OutputError: If it is not of the type and shape that were announced.
        """
        slot = self._slots[key]
        dtype, shape = slot.outline.dtype, slot.outline.shape
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise OutputError(
                f"tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, announced was "
                f"{dtype} {tuple(shape)}"
            )
        self._write(bytes_of(tensor), self._header_size + slot.start)
        self._missing.discard(key)
        if slot.stop - slot.start >= _LARGE:
            self._cached.append(slot)

    def flush(self) -> None:
        """Bring what has been written to the disk.

        Of large tensors the system's cache is then let go, or it would give up the inputs for them,
        which are read twice. Small ones share pages with their neighbours, yet to be written.
        """
        flushed = [self._cached.pop() for _ in range(len(self._cached))]
        os.fsync(self._file)
        for slot in flushed:
            uncache(self._file, self._header_size + slot.start, slot.stop - slot.start)

    def data_sha256(self) -> str:
        """Digest of the data after the header, all of which has been written."""
        digest, place = hashlib.sha256(), self._header_size
        chunk = memoryview(bytearray(_CHUNK))
        while count := read_at(self._file, chunk, place):
            digest.update(chunk[:count])
            place += count
        return digest.hexdigest()

    def finish(self, strings: Mapping[str, str]) -> None:
        """Complete the file.

        Args:
            strings: The header's strings, as long as they were at first.

        Raises:
            OutputError: If a tensor is missing.
        """
        if self._missing:
            raise OutputError(f"tensors were not written: {listed(sorted(self._missing))}")
        if strings != self._strings:
            header = _header(self._slots, strings)
            if len(header) != self._header_size:
                raise OutputError("the header is not as long as was announced")
            self._write(header, 0)
        self.close()

    def take(self, keys: Set[str]) -> None:
        """Leave tensors to other writers of the same file, who have written them."""
        self._missing -= keys

    def close(self) -> None:
        """Close the file, complete or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, data: bytes | memoryview, place: int) -> None:
        """Write bytes at a place."""
        view = memoryview(data)
        while view:
            count = write_at(self._file, view, place)
            view, place = view[count:], place + count


def _placed(known: Mapping[str, Tensor]) -> dict[str, _Slot]:
    """The places of tensors: wide types first, so that every tensor is aligned."""
    slots: dict[str, _Slot] = {}
    offset = 0
    for key in sorted(known, key=lambda key: (-known[key].element_size(), key)):
        tensor = known[key]
        end = offset + tensor.numel() * tensor.element_size()
        slots[key] = _Slot(offset, end, tensor)
        offset = end
    return slots


def _header(slots: Mapping[str, _Slot], strings: Mapping[str, str]) -> bytes:
    """The bytes before the data."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    for key, slot in slots.items():
        header[key] = {
            "dtype": SAFETENSORS_TYPES[slot.outline.dtype],
            "shape": list(slot.outline.shape),
            "data_offsets": [slot.start, slot.stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
