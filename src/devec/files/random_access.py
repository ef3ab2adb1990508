"""A file of tensors that stays open, from which one tensor at a time is read.

Tensors are read into memory of their own rather than mapped: mapped pages of a large file count as
the memory of the process, and one that is cut short meanwhile would end it without a word.
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from devec.errors import FormatError
from devec.files.positions import BINARY, read_at
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
