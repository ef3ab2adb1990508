"""Random access to open files: reading single tensors, and bytes at offsets.

Tensors are read into memory rather than mapped. Mapped pages of a large file count as memory of the
process, and truncating a mapped file kills the process without a message.
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from devec.errors import FormatError
from devec.linalg.buffers import empty


class TensorSpan(NamedTuple):
    """The bytes of a tensor in a file: their offset, and the tensor's shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class OpenFile:
    """A file that stays open for reading; reads fail if it has changed since it was opened."""

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self._path = path
        self._file = os.open(path, os.O_RDONLY | BINARY)
        weakref.finalize(self, os.close, self._file)
        self._opened = self._version()

    def read(self, span: TensorSpan) -> Tensor:
        """Read a tensor into memory."""
        size = math.prod(span.shape) * span.dtype.itemsize
        data = empty((size,), torch.uint8)
        if size:
            self._fill(data.numpy().data, span.offset)
        return data.view(span.dtype).view(span.shape)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes of the file from an offset."""
        try:
            while buffer and (count := read_at(self._file, buffer, offset)):
                buffer, offset = buffer[count:], offset + count
            unchanged = self._version() == self._opened
        except OSError as error:
            raise FormatError(f"{self._path} cannot be read any more ({error})") from error
        if buffer or not unchanged:
            raise FormatError(
                f"{self._path} was changed while it was being read; run again when it is complete"
            )

    def _version(self) -> tuple[int, int]:
        """Size and modification time of the file, which differ once it was written to."""
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


# Flag of `os.open` for binary mode, which only Windows distinguishes.
BINARY: int = getattr(os, "O_BINARY", 0)
_MAX_BYTES = 1 << 30  # every system accepts this many in one call
_HAS_POSITIONED_CALLS = hasattr(os, "preadv") and hasattr(os, "pwrite")


_seeking = Lock()


def read_at(file: int, buffer: memoryview, offset: int) -> int:
    """Read bytes of a file into a buffer; return their number, which is 0 at the end."""
    buffer = buffer[:_MAX_BYTES]
    if _HAS_POSITIONED_CALLS:
        return os.preadv(file, [buffer], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Write bytes to a file; return their number, which may be smaller than that of the data."""
    data = data[:_MAX_BYTES]
    if _HAS_POSITIONED_CALLS:
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def uncache(file: int, offset: int, size: int) -> None:
    """Drop flushed bytes of a file from the system's cache, where the system has a call for it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
