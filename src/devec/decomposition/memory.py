"""Errors of torch and Python for lack of memory, as errors that say what needed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from devec.errors import DevecError

# Messages of torch and Python where they have no exception class of their own.
_MESSAGES = ("allocate memory", "not enough memory", "out of memory", "start new thread")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what the memory was needed for if there is too little of it.

    Args:
        what: What needs the memory, for the message.

    Raises:
        DevecError: If there is too little memory.
        MemoryError: Never; it becomes a `DevecError`.
        RuntimeError: Any other error of torch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for GPUs, and none for the memory of the CPU
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacking and not any(message in str(error) for message in _MESSAGES):
            raise
        reason = (str(error).strip().splitlines() or ["none is left"])[0]
        raise DevecError(
            f"too little memory for {what} ({reason}); nothing was written. Fewer threads "
            "(OMP_NUM_THREADS=1) need less"
        ) from error
