"""Reading and writing at places of open files, from several threads at once.

Where the system has no calls for it, as Windows, a file's own place is moved, one thread at a time.
"""

from __future__ import annotations

import os
from threading import Lock

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
