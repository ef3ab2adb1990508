"""The engine: splits every module of a pool, and gives the parts to sinks.

`devec.decompose` collects the parts in memory, `devec.decompose_to` writes them to files; both run
this one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from devec.decomposition.findings import Findings, Part
from devec.decomposition.question import PartName, Question
from devec.decomposition.scopes import SCOPES
from devec.decomposition.stacks.build import sound_stacks
from devec.decomposition.stacks.stack import Stack, UnsoundError
from devec.decomposition.workers import in_parallel
from devec.deltas.delta import Delta


class Sink(Protocol):
    """Where the modules of one part go. Threads give it different modules at the same time."""

    def accept(self, deltas: Mapping[str, Delta | None]) -> None:
        """Store some modules; None stands for a zero."""


def run(
    question: Question,
    work: Sequence[Stack],
    sinks: Mapping[PartName, Sink],
    *,
    around: Callable[[Stack], AbstractContextManager[object]] = nullcontext,
    keep_bases: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Findings]:
    """Split stacks, several at a time, and give their parts to the sinks.

    Args:
        question: What counts as shared, and which parts are made.
        work: The modules of the pool, in stacks.
        sinks: Where each part of the question goes.
        around: Context in which a stack is split.
        keep_bases: Whether findings keep the shared bases, or their shapes only.
        progress: Called with the name of each module when it is done.

    Yields:
        The findings of each stack, in order.
    """

    def split_one(stack: Stack) -> Findings:
        findings = Findings()
        try:
            with around(stack):
                for part in split(question, stack, findings):
                    findings.add_part(part)
                    sinks[part.name].accept(part.deltas)
                    del part  # frees memory before the next part is made
        finally:
            stack.release()
        return findings if keep_bases else findings.outlined()

    for stack, findings in zip(work, in_parallel(split_one, work), strict=True):
        yield findings
        for module in stack.modules if progress is not None else ():
            progress(module)  # type: ignore[misc]


def split(question: Question, stack: Stack, findings: Findings) -> Iterator[Part]:
    """The parts of the modules of a stack, an adapter at a time.

    Modules that are too ill-conditioned for the batch are split one by one.
    """
    scope = SCOPES[question.scope]
    pending = [stack]
    while pending:
        stack = pending.pop()
        try:
            with stack.located():
                yield from scope.split(question, stack, findings)
        except UnsoundError as error:
            pending += sound_stacks(stack, error.modules)
