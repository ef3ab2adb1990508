"""A file of tensors that stays open, from which one tensor at a time is read.

Tensors are read into memory of their own rather than mapped: mapped pages of a large file count as
the memory of the process, and one that is cut short meanwhile would end it without a word.
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


class Place(NamedTuple):
    """Where a tensor lies in a file, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class OpenFile:
    """A file as it was when it was opened.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self._path = path
        self._file = os.open(path, os.O_RDONLY | BINARY)
        weakref.finalize(self, os.close, self._file)
        self._opened = self._state()

    def read(self, place: Place) -> Tensor:
        """A tensor, in memory of its own.

        Args:
            place: Where it lies.

        Returns:
            The tensor.

        Raises:
            FormatError: If the file cannot be read, or is not what it was.
        """
        size = math.prod(place.shape) * place.dtype.itemsize
        held = empty((size,), torch.uint8)
        if size:
            self._fill(held.numpy().data, place.start)
        return held.view(place.dtype).view(place.shape)

    def _fill(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with what stands in the file from a place on."""
        try:
            while buffer and (count := read_at(self._file, buffer, start)):
                buffer, start = buffer[count:], start + count
            unchanged = self._state() == self._opened
        except OSError as error:
            raise FormatError(f"{self._path} cannot be read any more ({error})") from error
        if buffer or not unchanged:
            raise FormatError(
                f"{self._path} was changed while it was being read; run again when it is complete"
            )

    def _state(self) -> tuple[int, int]:
        """What changes when a file is written to."""
        known = os.fstat(self._file)
        return known.st_size, known.st_mtime_ns


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


# Of `os.open`: bytes as they are, which Windows alone has to be told.
BINARY: int = getattr(os, "O_BINARY", 0)
_MOST = 1 << 30  # no system takes less in one call
_AT_ONCE = hasattr(os, "preadv") and hasattr(os, "pwrite")


_moving = Lock()


def read_at(file: int, buffer: memoryview, start: int) -> int:
    """Read into a buffer.

    Args:
        file: Descriptor of the file.
        buffer: Bytes, which may be written to.
        start: Where to begin.

    Returns:
        How many bytes were read: fewer than there is room for, and 0 at the end of the file.
    """
    buffer = buffer[:_MOST]
    if _AT_ONCE:
        return os.preadv(file, [buffer], start)
    with _moving:
        os.lseek(file, start, os.SEEK_SET)
        data = os.read(file, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(file: int, data: memoryview, start: int) -> int:
    """Write bytes.

    Args:
        file: Descriptor of the file.
        data: The bytes.
        start: Where to begin.

    Returns:
        How many bytes were written, which may be fewer than there are.
    """
    data = data[:_MOST]
    if _AT_ONCE:
        return os.pwrite(file, data, start)
    with _moving:
        os.lseek(file, start, os.SEEK_SET)
        return os.write(file, data)


def uncache(file: int, start: int, size: int) -> None:
    """Let go of the system's cache of a stretch of a file, where there is a call for it.

    Args:
        file: Descriptor of the file; what of the stretch is not on the disk yet stays.
        start: Where it begins.
        size: How many bytes it has.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)
