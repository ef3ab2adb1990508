"""How many threads torch uses in one thread of Python, apart from what it uses in others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, local

import torch


class _ThreadState(local):
    """What a thread knows of itself."""

    in_worker_thread = False


_STATE = _ThreadState()
_SETTING_LOCK = Lock()
_EXECUTORS_LOCK = Lock()
_EXECUTORS: dict[tuple[str, int, int], ThreadPoolExecutor] = {}


def shared_executor(name: str, size: int, count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses a given number of threads.

    They are shared by all calls and stay for the life of the process, since beginning one changes a
    setting of the process for a moment (see `use_threads`).

    Args:
        name: What they do. Work must not wait for other work of the same name.
        size: How many there are at most.
        count: How many threads torch uses in each.

    Returns:
        The executor, the same for the same arguments, which is never shut down.
    """
    with _EXECUTORS_LOCK:
        executor = _EXECUTORS.get((name, size, count))
        if executor is None:
            executor = ThreadPoolExecutor(size, f"devec-{name}", _start_worker, (count,))
            _EXECUTORS[name, size, count] = executor
        return executor


def in_worker_thread() -> bool:
    """Whether the calling thread is one of a crew, which must not wait for others of its crew."""
    return _STATE.in_worker_thread


def _start_worker(count: int) -> None:
    """Prepare a thread of a crew."""
    _STATE.in_worker_thread = True
    use_threads(count)


def use_threads(count: int) -> None:
    """Set the number of threads that torch uses in the calling thread.

    `torch.set_num_threads` sets the number of the calling thread and that of all threads that first
    use torch later. Another thread reads the latter first and sets it again afterwards. So the
    setting of the process is the same before and after, however many threads call this at once; a
    thread that first uses torch in between, within some milliseconds, takes on this number.

    Args:
        count: The number.

    Cost: a thread is begun and waited for twice; nothing if the number is the same already.
    """
    if torch.get_num_threads() == count:
        return
    with _SETTING_LOCK, ThreadPoolExecutor(1, "devec-threads") as other:
        default = other.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        other.submit(torch.set_num_threads, default).result()


if hasattr(os, "register_at_fork"):  # a child process has none of the threads
    os.register_at_fork(after_in_child=_EXECUTORS.clear)
