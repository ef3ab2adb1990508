"""Writing safetensors files tensor by tensor, in any order, from one or more processes.

The bytes of a file depend only on its contents. The safetensors library, in contrast, varies the
order of the metadata between runs, and needs all tensors at once.
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
_LARGE_TENSOR = 1 << 20


class _Slot(NamedTuple):
    """The bytes reserved for a tensor, as offsets from the end of the header, and its outline."""

    start: int
    stop: int
    outline: Tensor


class TensorWriter:
    """A safetensors file that is being written.

    The offset of every tensor is fixed from the beginning, so tensors may be written in any order
    and by several processes, each with its own writer.

    Args:
        path: The file.
        known: Key → outline of the tensor.
        strings: The strings of the header.
        create: Whether to create the file; if not, another writer has created it.

    Raises:
        OutputError: If the file that another writer created has another header.
    """

    def __init__(
        self, path: Path, known: Mapping[str, Tensor], strings: Mapping[str, str], *, create: bool
    ) -> None:
        """Open the file; create it at its final size if asked."""
        self._slots = _slots(known)
        header = _header(self._slots, strings)
        self._header_size, self._strings = len(header), strings
        end = max((slot.stop for slot in self._slots.values()), default=0)
        self._missing = set(self._slots)
        self._cached: list[_Slot] = []  # large tensors that may be in the system's cache
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
        """Refuse a file with another size or header."""
        existing = memoryview(bytearray(len(header)))
        if os.fstat(self._file).st_size != size or read_at(self._file, existing, 0) < len(header):
            existing = existing[:0]
        if existing != header:
            raise OutputError(
                "another process plans this output otherwise; give all processes the same options, "
                "base models and libraries"
            )

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor, whose dtype and shape must be those of its outline."""
        slot = self._slots[key]
        dtype, shape = slot.outline.dtype, slot.outline.shape
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise OutputError(
                f"tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, announced was "
                f"{dtype} {tuple(shape)}"
            )
        self._write(bytes_of(tensor), self._header_size + slot.start)
        self._missing.discard(key)
        if slot.stop - slot.start >= _LARGE_TENSOR:
            self._cached.append(slot)

    def flush(self) -> None:
        """Flush written tensors to the disk, and drop large ones from the system's cache.

        Otherwise they would displace the inputs, which are read twice. Small tensors stay, as they
        share pages with tensors that are not written yet.
        """
        flushed = [self._cached.pop() for _ in range(len(self._cached))]
        os.fsync(self._file)
        for slot in flushed:
            uncache(self._file, self._header_size + slot.start, slot.stop - slot.start)

    def data_sha256(self) -> str:
        """The digest of the data after the header; all tensors must have been written."""
        digest, offset = hashlib.sha256(), self._header_size
        chunk = memoryview(bytearray(_CHUNK))
        while count := read_at(self._file, chunk, offset):
            digest.update(chunk[:count])
            offset += count
        return digest.hexdigest()

    def finish(self, strings: Mapping[str, str]) -> None:
        """Close the complete file, with final strings that take as many bytes as the first ones."""
        if self._missing:
            raise OutputError(f"tensors were not written: {listed(sorted(self._missing))}")
        if strings != self._strings:
            header = _header(self._slots, strings)
            if len(header) != self._header_size:
                raise OutputError("the header is not as long as was announced")
            self._write(header, 0)
        self.close()

    def mark_written(self, keys: Set[str]) -> None:
        """Mark tensors as written by other writers of the same file."""
        self._missing -= keys

    def close(self) -> None:
        """Close the file, complete or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at an offset."""
        view = memoryview(data)
        while view:
            count = write_at(self._file, view, offset)
            view, offset = view[count:], offset + count


def _slots(known: Mapping[str, Tensor]) -> dict[str, _Slot]:
    """The slots of tensors: wide dtypes first, so that every tensor is aligned."""
    slots: dict[str, _Slot] = {}
    offset = 0
    for key in sorted(known, key=lambda key: (-known[key].element_size(), key)):
        tensor = known[key]
        end = offset + tensor.numel() * tensor.element_size()
        slots[key] = _Slot(offset, end, tensor)
        offset = end
    return slots


def _header(slots: Mapping[str, _Slot], strings: Mapping[str, str]) -> bytes:
    """The bytes of the header, including its length."""
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
