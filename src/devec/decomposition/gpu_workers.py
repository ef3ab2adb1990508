"""Work on stacks on a GPU, in threads each of which has a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from devec.decomposition.stacks.stack import Stack
from devec.linalg.threads import use_threads

V = TypeVar("V")

# Some stacks are copied while another is computed.
_MOST_WORKERS = 4


def on_gpu(call: Callable[[Stack], V], work: Sequence[Stack], device: torch.device) -> Iterator[V]:
    """Call a function for all stacks on streams of a GPU, and yield the results in order."""
    outer = torch.cuda.current_stream(device)
    device = outer.device  # the current GPU is a setting of each thread
    cores, workers = torch.get_num_threads(), _workers(work, device)
    # torch loads its solvers at their first call, which must not happen in several threads at once
    torch.linalg.cholesky_ex(torch.eye(1, device=device))

    def begin() -> None:
        torch.set_grad_enabled(False)
        use_threads(max(1, cores // workers))
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(outer)  # inputs may still be computed there
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


def _workers(work: Sequence[Stack], device: torch.device) -> int:
    """How many stacks are worked on at a time: as many as the free memory of the GPU allows."""
    largest = max((stack.working_bytes for stack in work), default=1)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(1, min(_MOST_WORKERS, len(work), free // largest))
