"""Memory of large tensors that is used again, while modules of one shape follow one another.

What an allocator makes of blocks of many megabytes is either returned to the system, and made anew
page by page, or kept, with gaps between what is in use. Stacks of one shape need blocks of the same
few sizes again and again.
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

# Smaller ones do well in the allocator.
_LARGE_BYTES = 1 << 20

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class MemoryBlocks:
    """Blocks of memory that tensors of one job have left, apart for each thread."""

    def __init__(self) -> None:
        """Start with none."""
        self._of: dict[int, dict[int, list[mmap.mmap]]] = {}

    def of_this_thread(self) -> dict[int, list[mmap.mmap]]:
        """Size in bytes → blocks that no tensor uses."""
        return self._of.setdefault(threading.get_ident(), {})

    def clear(self) -> None:
        """Free all of them, but for those of tensors that live on, which keep them."""
        self._of.clear()


class _ThreadMemory(threading.local):
    """The blocks that a thread uses.

    Attributes:
        active: Whether it is within `reuse_memory`.
        free: Size in bytes → blocks that no tensor uses.
        sizes: Sizes that were asked for since that began.
    """

    def __init__(self) -> None:
        self.active = False
        self.free: dict[int, list[mmap.mmap]] = {}
        self.sizes: set[int] = set()


_memory = _ThreadMemory()


@contextmanager
def reuse_memory(blocks: MemoryBlocks) -> Iterator[None]:
    """Let large tensors on the CPU use the memory that earlier ones in this thread have left.

    Where a block is missing, those of sizes that nothing has asked for since this began are freed:
    modules of another shape have left them.

    Args:
        blocks: The blocks of the job.

    Yields:
        Nothing.
    """
    _memory.active, _memory.sizes, _memory.free = True, set(), blocks.of_this_thread()
    try:
        yield
    finally:
        _memory.active, _memory.free = False, {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A new tensor with any values.

    Args:
        shape: Its shape.
        dtype: Its type.
        device: Where it lies.

    Returns:
        The tensor.

    Raises:
        MemoryError: If there is too little memory.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if not _memory.active or size < _LARGE_BYTES or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    _memory.sizes.add(size)
    free = _memory.free.setdefault(size, [])
    if not free:
        for other in _memory.free.keys() - _memory.sizes:
            del _memory.free[other]
    view = memoryview(block := free.pop() if free else _new_block(size))
    # torch holds the view for as long as any tensor lies in it
    weakref.finalize(view, free.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(tuple(shape))


@full_precision
def matmul(X: Tensor, Y: Tensor) -> Tensor:
    """X·Y.

    Args:
        X: Left factor, or a stack of them.
        Y: Right factor, or a stack of as many.

    Returns:
        The product.
    """
    if not _memory.active or X.device.type != "cpu":
        return X @ Y
    return torch.matmul(X, Y, out=empty((*X.shape[:-1], Y.shape[-1]), X.dtype))


def return_memory() -> None:
    """Return memory that is free to the system, which the GNU C library keeps for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _new_block(size: int) -> mmap.mmap:
    """A new block of memory."""
    try:
        return mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:  # of which the number is not the same on all systems
        raise MemoryError(f"can't allocate {size} bytes") from error
