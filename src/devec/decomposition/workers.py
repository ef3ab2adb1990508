"""Work on stacks in threads: two on a CPU, more on a GPU, as far as there is memory for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Semaphore
from typing import TypeVar

import torch

from devec.decomposition.stack import Stack
from devec.errors import DevecError
from devec.linalg.precision import full_precision
from devec.linalg.threads import in_worker_thread, shared_executor, use_threads

V = TypeVar("V")

# What stacks that are worked on at the same time may take together.
_WORKING_BYTES = 1 << 28

# How many stacks at a time, at most. On a CPU of 16 cores two were fastest, as more of them wait
# for the interpreter's lock; on a GPU four, some of which copy while one computes.
_WORKERS = {"cpu": 2, "cuda": 4, "mps": 1}

# What torch and Python say where they have no error of their own for it.
_LACKING = ("allocate memory", "not enough memory", "out of memory", "start new thread")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what there is too little memory for.

    Args:
        what: What it is.

    Yields:
        Nothing.

    Raises:
        DevecError: If there was too little.
        MemoryError: Never.
        RuntimeError: What else torch has raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for GPUs, and none for the memory of the CPU
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacking and not any(said in str(error) for said in _LACKING):
            raise
        reason = (str(error).strip().splitlines() or ["no more to be had"])[0]
        raise DevecError(
            f"too little memory for {what} ({reason}); nothing was written. Fewer threads "
            "(OMP_NUM_THREADS=1) need less"
        ) from error


def _workers(work: Sequence[Stack], device: torch.device) -> int:
    """How many stacks are worked on at a time."""
    largest = max((stack.working_bytes for stack in work), default=1)
    most, room = min(_WORKERS.get(device.type, 1), len(work)), _WORKING_BYTES
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = torch.cuda.mem_get_info(device)[0] + cached
    elif device.type == "cpu":
        most = min(most, torch.get_num_threads())
    return max(1, min(most, room // largest))


def in_parallel(call: Callable[[Stack], V], work: Sequence[Stack]) -> Iterator[V]:
    """The results of a call for all stacks, in order.

    Args:
        call: The call.
        work: The stacks.

    Yields:
        The results.
    """
    call = full_precision(call)
    devices = {stack.device for stack in work if stack.device.type != "cpu"}
    if len(devices) > 1:  # each of which has streams of its own
        for stack in work:
            with torch.no_grad():
                result = call(stack)
            yield result
    elif any(device.type == "cuda" for device in devices):
        yield from _on_gpu(call, work, devices.pop())
    else:
        device = devices.pop() if devices else torch.device("cpu")
        yield from _on_cpu(call, work, _workers(work, device))


def _on_cpu(call: Callable[[Stack], V], work: Sequence[Stack], workers: int) -> Iterator[V]:
    """The results of a call in threads, each of which has a share of the cores."""
    share = max(1, torch.get_num_threads() // workers)
    gate = Semaphore(workers)  # there are threads for small modules and for large ones

    def compute(stack: Stack) -> V:
        with gate, torch.no_grad():
            return call(stack)

    if in_worker_thread():  # a call within a call
        for stack in work:
            yield compute(stack)
        return
    futures: list[Future[V]] = []
    try:
        for stack in work:
            # products of stacks of small modules are over before other threads have begun
            threads = 1 if len(stack.modules) > 1 else share
            with memory_for("a thread"):
                futures.append(shared_executor("stacks", workers, threads).submit(compute, stack))
        for future in futures:  # in order, so that the same error is told each time
            yield future.result()
    finally:
        wait([future for future in futures if not future.cancel()])


def _on_gpu(call: Callable[[Stack], V], work: Sequence[Stack], device: torch.device) -> Iterator[V]:
    """The results of a call in threads, each of which has a stream of its own."""
    outer = torch.cuda.current_stream(device)
    device = outer.device  # threads choose GPUs for themselves
    cores, workers = torch.get_num_threads(), _workers(work, device)
    # torch loads its solvers at their first call, which threads must not do
    torch.linalg.cholesky_ex(torch.eye(1, device=device))

    def begin() -> None:
        torch.set_grad_enabled(False)
        use_threads(max(1, cores // workers))
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(outer)  # what is given may be computed there
        torch.cuda.set_stream(stream)

    def complete(stack: Stack) -> V:
        result = call(stack)
        torch.cuda.current_stream(device).synchronize()
        return result

    executor = ThreadPoolExecutor(workers, "devec", begin)
    try:
        futures = [executor.submit(complete, stack) for stack in work]
        for future in futures:
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)
