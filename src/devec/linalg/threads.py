"""Worker threads with a fixed number of torch threads each, and setting that number safely."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, local

import torch


class _ThreadState(local):
    """State of one thread."""

    in_worker_thread = False


_THREAD = _ThreadState()
_SETTING_LOCK = Lock()
_EXECUTORS_LOCK = Lock()
_EXECUTORS: dict[tuple[str, int, int], ThreadPoolExecutor] = {}


def shared_executor(name: str, size: int, count: int) -> ThreadPoolExecutor:
    """The executor of this name with at most `size` workers and `count` torch threads in each."""
    # It is never shut down: starting a worker briefly changes a setting of the process (see
    # `use_threads`). Its tasks must not wait for other tasks of the same executor.
    with _EXECUTORS_LOCK:
        executor = _EXECUTORS.get((name, size, count))
        if executor is None:
            executor = ThreadPoolExecutor(size, f"devec-{name}", _start_worker, (count,))
            _EXECUTORS[name, size, count] = executor
        return executor


def in_worker_thread() -> bool:
    """Whether the calling thread is a worker, which must not wait for tasks of its executor."""
    return _THREAD.in_worker_thread


def _start_worker(count: int) -> None:
    """Prepare a worker thread."""
    _THREAD.in_worker_thread = True
    use_threads(count)


def use_threads(count: int) -> None:
    """Set the number of threads that torch uses in the calling thread only."""
    if torch.get_num_threads() == count:
        return
    # `torch.set_num_threads` also sets the default for threads that first use torch later. A helper
    # thread reads that default before and restores it after, so it does not change however many
    # threads call this at once. Only a thread that first uses torch in between, within
    # milliseconds, starts with `count`.
    with _SETTING_LOCK, ThreadPoolExecutor(1, "devec-threads") as other:
        default = other.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        other.submit(torch.set_num_threads, default).result()


if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
    os.register_at_fork(after_in_child=_EXECUTORS.clear)
