"""Scopes: which adapters of a pool are compared, and which parts follow.

A scope looks at the factors of all adapters of a stack once to find what they share. It then goes
through the adapters again and yields their parts one adapter at a time, so that memory holds the
factors of one adapter and the shared basis only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from devec.decomposition.findings import Findings, ModuleSplit, Part
from devec.decomposition.question import Kind, PartName, Question
from devec.decomposition.stacks.stack import Stack
from devec.deltas.delta import Delta
from devec.deltas.weighted_mean import WeightedMean
from devec.linalg.chance import chance_level, random_edge
from devec.linalg.subspaces import SharedSubspace, deflate, shared_by_all

# Relative accuracy of differences of squared norms.
_SQUARES_RTOL = 1e-4


class Scope(Protocol):
    """Which adapters are compared, and which parts follow.

    Attributes:
        name: What users call it.
        pairs: Whether adapters are compared two at a time.
        targeted: Whether it splits one adapter, the target.
        batched: Whether modules of one shape may be split together.
    """

    name: str
    pairs: bool
    targeted: bool
    batched: bool

    def parts(self, names: Sequence[str], target: str) -> tuple[PartName, ...]:
        """The parts that may result."""

    def split(self, question: Question, stack: Stack, findings: Findings) -> Iterator[Part]:
        """Yield the parts of the modules of a stack; rows and norms go to the findings."""


class WholePool:
    """One shared subspace for the whole pool, and a common vector in it (Eq. 8-14)."""

    name, pairs, targeted, batched = "all", False, False, True

    def parts(self, names: Sequence[str], target: str) -> tuple[PartName, ...]:
        """Unique parts, shared parts, the common vector."""
        del target
        kinds: tuple[Kind, Kind] = ("unique", "shared")
        each = [PartName(kind, (name,)) for name in names for kind in kinds]
        return (*each, PartName("common", tuple(names)))

    def split(self, question: Question, stack: Stack, findings: Findings) -> Iterator[Part]:
        """Yield the parts of the modules of a stack."""
        in_all = len(stack.names) == len(question.names)
        group = _Group(question, stack, stack.names) if in_all else None
        for name in stack.names:
            shared: Sequence[Delta | None] = [None] * len(stack.modules)
            unique: Sequence[Delta] = []
            if group is not None:
                shared, unique = group.parts(name)
            findings.add_norms(name, stack)
            norms = [0.0] * len(shared) if group is None else group.shared_norms[-1]
            unique = unique or stack.unchanged(name)
            rest = _rest_norms(stack.norms(name), norms, unique)
            yield Part(PartName("unique", (name,)), stack.named(unique), rest)
            unique = []  # frees memory before the next part is made
            yield Part(PartName("shared", (name,)), stack.named(shared), norms)
            shared = []
        if group is not None:
            yield Part(PartName("common", question.names), stack.named(group.common()))
            findings.rows += group.rows()


class Pairwise:
    """One shared subspace for every pair, and the pair's common vector in it (Eq. 8-14, k = 2)."""

    name, pairs, targeted, batched = "pairwise", True, False, True

    def parts(self, names: Sequence[str], target: str) -> tuple[PartName, ...]:
        """The common vectors of the pairs."""
        del target
        return tuple(PartName("shared", pair) for pair in combinations(names, 2))

    def split(self, question: Question, stack: Stack, findings: Findings) -> Iterator[Part]:
        """Yield the parts of the modules of a stack."""
        stack.keep_bases()  # each is needed once for every other adapter
        for name in stack.names:
            findings.add_bias_norms(name, stack)
        for pair in combinations(question.names, 2):
            if all(name in stack.names for name in pair):
                group = _Group(question, stack, pair)
                for name in pair:
                    group.parts(name)
                yield Part(PartName("shared", pair), stack.named(group.common()))
                findings.rows += group.rows()


class Iterative:
    """The target loses what it shares with each of the others in turn (§4.3)."""

    name, pairs, targeted, batched = "iterative", True, True, False

    def parts(self, names: Sequence[str], target: str) -> tuple[PartName, ...]:
        """The unique and the shared part of the target."""
        del names
        return PartName("unique", (target,)), PartName("shared", (target,))

    def split(self, question: Question, stack: Stack, findings: Findings) -> Iterator[Part]:
        """Yield the parts of one module."""
        target = question.target
        if target not in stack.names:
            return
        others = [name for name in question.names if name != target and name in stack.names]
        U = stack.basis(target)[0]
        findings.add_norms(target, stack)
        steps = deflate(
            U, _Bases(stack, others, 0), lambda p, q: question.threshold_for(len(U), (p, q))
        )
        left = U.shape[1]
        for other, step in zip(others, steps, strict=True):
            findings.rows.append(_row_of_step(question, stack, other, left, step))
            left -= step.rank
        Z = torch.cat([U[:, :0], *(step.basis for step in steps)], dim=1)
        shared: Sequence[Delta | None] = [None]
        unique: Sequence[Delta] = stack.unchanged(target)
        norms = [0.0]
        if Z.shape[1]:
            shared, unique, *_, norms = stack.projected(target, Z[None], [Z.shape[1]])
        rest = _rest_norms(stack.norms(target), norms, unique)
        yield Part(PartName("unique", (target,)), stack.named(unique), rest)
        yield Part(PartName("shared", (target,)), stack.named(shared), norms)


SCOPES: dict[str, Scope] = {scope.name: scope for scope in (WholePool(), Pairwise(), Iterative())}


@dataclass(frozen=True)
class _Bases:
    """The bases of several adapters, which a stack computes when they are iterated over.

    Attributes:
        stack: The stack.
        group: The adapters.
        index: The module of the stack; None for all of them.
    """

    stack: Stack
    group: Sequence[str]
    index: int | None = None

    def __len__(self) -> int:
        return len(self.group)

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.group:
            bases = self.stack.basis(name)
            yield bases if self.index is None else bases[self.index]


class _Group:
    """The shared subspaces of several adapters in the modules of a stack, and their common vector.

    Args:
        question: The question.
        stack: The modules.
        names: The adapters.
    """

    def __init__(self, question: Question, stack: Stack, names: Sequence[str]) -> None:
        """Find the shared subspaces by the method of the question (Eq. 8-11)."""
        self.question, self.stack, self.names = question, stack, names
        self.subspace = _shared_subspace(question, stack, names)
        self.counts: list[int] = self.subspace.counts.tolist()
        self.shared_norms: list[list[float]] = []
        self._mean = WeightedMean(len(self.counts))

    def parts(self, name: str) -> tuple[list[Delta | None], list[Delta]]:
        """The shared and the unique parts of an adapter; the shared ones enter the mean."""
        if not any(self.counts):
            self.shared_norms.append([0.0] * len(self.counts))
            return [None] * len(self.counts), self.stack.unchanged(name)
        made = self.stack.projected(name, self.subspace.basis, self.counts)
        self.shared_norms.append(made.norms)
        self._mean.add(made.coordinates, made.exponents, made.norms, made.shared)
        return made.shared, made.unique

    def common(self) -> list[Delta | None]:
        """The common vectors (Eq. 14), None where nothing is shared."""
        result: list[Delta | None] = []
        for index, count in enumerate(self.counts):
            Z = self.subspace.basis[index, :, :count].to(self.stack.dtype)
            mean = self._mean.of(index, Z) if count else None
            result.append(None if mean is None else self.stack.result(mean))
        return result

    def rows(self) -> Iterator[ModuleSplit]:
        """The rows of the report, once the parts of all adapters were made."""
        ranks = [self.stack.rank(name) for name in self.names]
        norms = [self.stack.norms(name) for name in self.names]
        for index in range(len(self.counts)):
            yield _row(
                self.question,
                self.stack.modules[index],
                self.names,
                ranks,
                _of_module(self.subspace, index),
                [each[index] for each in norms],
                [each[index] for each in self.shared_norms],
            )


def _shared_subspace(question: Question, stack: Stack, names: Sequence[str]) -> SharedSubspace:
    """The subspaces that several adapters share, by the method of the question."""
    bases = _Bases(stack, names)

    def threshold() -> float:
        ranks = [stack.rank(name) for name in names]
        return question.threshold_for(stack.rows, ranks) if all(ranks) else math.inf

    subspace = question.method(bases, threshold)
    if not all(stack.rank(name) for name in names):  # nothing is shared with zero
        return dataclasses.replace(subspace, spectrum=subspace.spectrum[..., :0])
    if question.threshold != "auto" or len(names) <= 2:
        return subspace
    return shared_by_all(subspace, bases, _chance_level_of_line)


def _chance_level_of_line(n: int, rank: int) -> float:
    """Chance level of the squared cosine between a random direction and a random subspace."""
    return chance_level(n, rank, 1)


def _of_module(subspace: SharedSubspace, index: int) -> SharedSubspace:
    """The shared subspace in one module of a stack."""
    count, spectrum = subspace.counts[index], subspace.spectrum[index]
    return dataclasses.replace(
        subspace,
        basis=subspace.basis[index, :, : int(count)],
        spectrum=spectrum[spectrum != 0] if subspace.padded else spectrum,
        counts=count,
    )


def _row_of_step(
    question: Question, stack: Stack, other: str, left: int, step: SharedSubspace
) -> ModuleSplit:
    """The row of the report for one step of the deflation of a target of rank `left`."""
    group = (question.target, other)
    shared = [0.0, 0.0]
    if step.rank:
        Z = step.basis[None]
        shared = [stack.projected(name, Z, [step.rank]).norms[0] for name in group]
    norms = [stack.norms(name)[0] for name in group]
    return _row(question, stack.modules[0], group, (left, stack.rank(other)), step, norms, shared)


def _row(
    question: Question,
    module: str,
    group: Sequence[str],
    ranks: Sequence[int],
    subspace: SharedSubspace,
    norms: Sequence[float],
    shared_norms: Sequence[float],
) -> ModuleSplit:
    """The row of the report for a group of adapters in a module."""
    n = len(subspace.basis)
    return ModuleSplit(
        module=module,
        group=tuple(group),
        ranks=tuple(ranks),
        threshold=question.threshold_for(n, ranks),
        edge=question.method.bound(n, ranks, random_edge),
        spectrum=subspace.spectrum.cpu(),
        quantity=subspace.quantity,
        basis=subspace.basis.cpu(),
        norms=tuple(norms),
        shared_norms=tuple(shared_norms),
    )


def _rest_norms(
    norms: Sequence[float], shared: Sequence[float], rest: Sequence[Delta]
) -> list[float]:
    """‖ΔW - shared‖_F of each module: by Pythagoras, or measured where squares are too close."""
    result = []
    for norm, part, delta in zip(norms, shared, rest, strict=True):
        fraction = 1 - (part / norm) ** 2 if norm else 0.0
        lost = not fraction > _SQUARES_RTOL and delta.gain is None
        result.append(delta.weight_norm() if lost else norm * math.sqrt(max(0.0, fraction)))
    return result
