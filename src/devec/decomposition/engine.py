"""The engine: splits every module of a pool, and gives the parts to sinks.

`devec.decompose` collects the parts in memory, `devec.decompose_to` writes them to files; both run
this one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from devec.decomposition.findings import Findings, Part
from devec.decomposition.question import PartName
from devec.decomposition.request import Request
from devec.decomposition.stacks.build import sound_stacks, stacks_of
from devec.decomposition.stacks.stack import Stack, UnsoundError
from devec.decomposition.workers import in_parallel
from devec.deltas.delta import Delta
from devec.errors import collected_warnings, warn


class Sink(Protocol):
    """Where the modules of one part go. Threads give it different modules at the same time."""

    def accept(self, deltas: Mapping[str, Delta | None]) -> None:
        """Store some modules; None stands for a zero."""


def run(
    request: Request,
    sinks: Mapping[PartName, Sink],
    *,
    device: torch.device | str | None = None,
    share: Callable[[Sequence[Stack]], Sequence[Stack]] = lambda stacks: stacks,
    around: Callable[[Stack], AbstractContextManager[object]] = nullcontext,
    keep_bases: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Findings:
    """Split all modules of a pool, several stacks at a time, and give their parts to the sinks.

    Args:
        request: The pool, what counts as shared, and which parts are made.
        sinks: Where each part goes.
        device: Where to compute; by default where the tensors are.
        share: The stacks on which this process works; by default all.
        around: Context in which a stack is split.
        keep_bases: Whether findings keep the shared bases, or their shapes only.
        progress: Called with the name of each module when it is done.

    Returns:
        The findings of all stacks.
    """

    def split_one(stack: Stack) -> tuple[Findings, list[str]]:
        findings = Findings()
        try:
            with around(stack), collected_warnings() as warnings:
                for part in split(request, stack, findings):
                    findings.add_part(part)
                    sinks[part.name].accept(part.deltas)
                    del part  # frees memory before the next part is made
        finally:
            stack.release()
        return findings if keep_bases else findings.outlined(), warnings

    total = Findings()
    work = share(list(stacks_of(request.pool, device, batched=request.scope.batched)))
    for stack, (findings, warnings) in zip(work, in_parallel(split_one, work), strict=True):
        total.add(findings)
        for message in warnings:  # in the thread that the user's line called
            warn(message)
        for module in stack.modules if progress is not None else ():
            progress(module)  # type: ignore[misc]
    return total


def split(request: Request, stack: Stack, findings: Findings) -> Iterator[Part]:
    """The parts of the modules of a stack, an adapter at a time.

    Modules that are too ill-conditioned for the batch are split one by one.
    """
    pending = [stack]
    while pending:
        stack = pending.pop()
        try:
            with stack.located():
                yield from request.scope.split(request.question, stack, findings)
        except UnsoundError as error:
            pending += sound_stacks(stack, error.modules)
