"""Reuse of the memory of large tensors while modules of one shape follow one another.

An allocator either returns blocks of many megabytes to the system, which then creates them again
page by page, or keeps them and fragments memory. Stacks of one shape need blocks of the same few
sizes over and over.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from devec.linalg.precision import full_precision

# Smaller tensors come from torch's allocator.
_LARGE_BYTES = 1 << 20

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class MemoryBlocks:
    """Free memory blocks of one job, kept separately for each thread."""

    def __init__(self) -> None:
        """Start without blocks."""
        self._of: dict[int, dict[int, list[mmap.mmap]]] = {}

    def of_this_thread(self) -> dict[int, list[mmap.mmap]]:
        """Free blocks of the calling thread, by size in bytes."""
        return self._of.setdefault(threading.get_ident(), {})

    def clear(self) -> None:
        """Release all blocks; tensors that are still alive keep theirs."""
        self._of.clear()


class _ThreadMemory(threading.local):
    """The memory blocks of one thread.

    Attributes:
        active: Whether the thread is inside `reuse_memory`.
        free: Free blocks, by size in bytes.
        sizes: Sizes requested since the thread entered `reuse_memory`.
    """

    def __init__(self) -> None:
        self.active = False
        self.free: dict[int, list[mmap.mmap]] = {}
        self.sizes: set[int] = set()


_memory = _ThreadMemory()


@contextmanager
def reuse_memory(blocks: MemoryBlocks) -> Iterator[None]:
    """Let large CPU tensors of this thread use the blocks that earlier tensors have released."""
    _memory.active, _memory.sizes, _memory.free = True, set(), blocks.of_this_thread()
    try:
        yield
    finally:
        _memory.active, _memory.free = False, {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A new uninitialised tensor, in a reused block where one is free."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if not _memory.active or size < _LARGE_BYTES or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    _memory.sizes.add(size)
    free = _memory.free.setdefault(size, [])
    if not free:  # blocks of unrequested sizes belong to modules of another shape
        for other in _memory.free.keys() - _memory.sizes:
            del _memory.free[other]
    view = memoryview(block := free.pop() if free else _new_block(size))
    # torch keeps the view alive as long as any tensor uses its memory
    weakref.finalize(view, free.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(tuple(shape))


@full_precision
def matmul(X: Tensor, Y: Tensor) -> Tensor:
    """X·Y of matrices or stacks of matrices, in a reused block where one is free."""
    if not _memory.active or X.device.type != "cpu":
        return X @ Y
    return torch.matmul(X, Y, out=empty((*X.shape[:-1], Y.shape[-1]), X.dtype))


def return_memory() -> None:
    """Return free memory, which the GNU C library would keep, to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _new_block(size: int) -> mmap.mmap:
    """A new memory block; `MemoryError` if there is too little memory."""
    try:
        return mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:  # its number differs between systems
        raise MemoryError(f"can't allocate {size} bytes") from error
