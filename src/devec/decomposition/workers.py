"""Work on stacks in several threads, by the device on which they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from devec.decomposition.cpu_workers import on_cpu
from devec.decomposition.gpu_workers import on_gpu
from devec.decomposition.stacks.stack import Stack
from devec.linalg.precision import full_precision

V = TypeVar("V")


def in_parallel(call: Callable[[Stack], V], work: Sequence[Stack]) -> Iterator[V]:
    """Call a function for all stacks, several at a time, and yield the results in order.

    Stacks on a CPU or on one GPU run in threads, those of a pool on several devices one by one.
    """
    call = full_precision(call)
    devices = {stack.device for stack in work if stack.device.type != "cpu"}
    if len(devices) > 1:
        for stack in work:
            with torch.no_grad():
                result = call(stack)
            yield result
    elif any(device.type == "cuda" for device in devices):
        yield from on_gpu(call, work, devices.pop())
    else:
        yield from on_cpu(call, work)
