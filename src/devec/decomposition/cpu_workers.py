"""Work on stacks in threads of the CPU, each of which has a share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from threading import Event, Semaphore
from typing import TypeVar

import torch

from devec.decomposition.memory import memory_for
from devec.decomposition.stacks.stack import Stack
from devec.linalg.threads import in_worker_thread, shared_executor

V = TypeVar("V")

# On a CPU of 16 cores two stacks at a time were fastest: more threads wait for the interpreter's
# lock. Devices without streams of their own (MPS) compute one at a time.
_MOST_WORKERS = 2

# Memory that the stacks in progress may need together.
_WORKING_BYTES = 1 << 28


def on_cpu(call: Callable[[Stack], V], work: Sequence[Stack]) -> Iterator[V]:
    """Call a function for all stacks in threads, and yield the results in order.

    Within such a thread (a call within a call) the stacks are worked on one by one.
    """
    workers = _workers(work)
    gate = Semaphore(workers)  # there are threads for small modules and for large ones
    stopped = Event()  # also for work of which a signal has kept the future from this function

    def compute(stack: Stack) -> V:
        with gate, torch.no_grad():
            if stopped.is_set():
                raise CancelledError
            return call(stack)

    if in_worker_thread():
        for stack in work:
            yield compute(stack)
        return
    futures: list[Future[V]] = []
    try:
        for stack in work:
            threads = _threads_of(stack, workers)
            with memory_for("a thread"):
                futures.append(shared_executor("stacks", workers, threads).submit(compute, stack))
        for future in futures:  # in order, so that of several errors the same is raised each time
            yield future.result()
    finally:
        stopped.set()
        wait([future for future in futures if not future.cancel()])


def _workers(work: Sequence[Stack]) -> int:
    """How many stacks are worked on at a time: as cores, memory and the device allow."""
    if any(stack.device.type != "cpu" for stack in work):
        return 1
    largest = max((stack.working_bytes for stack in work), default=1)
    most = min(_MOST_WORKERS, len(work), torch.get_num_threads())
    return max(1, min(most, _WORKING_BYTES // largest))


def _threads_of(stack: Stack, workers: int) -> int:
    """How many threads torch uses for a stack; small products end before others have begun."""
    return 1 if len(stack.modules) > 1 else max(1, torch.get_num_threads() // workers)
