"""Modules of a pool: their column spaces, what they share, and the parts that follow from it.

Modules of one shape are split together, as a stack, where that is sound; the others, and DoRAs,
one by one. A scope is a generator: it looks at the factors of all adapters once to find what they
share, and then goes through the adapters again and yields their parts, one adapter at a time, so
that no more is held than one adapter's factors of these modules and the shared basis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from devec.decomposition.findings import Findings, ModuleSplit, Part
from devec.decomposition.question import Question
from devec.decomposition.stack import Stack, UnsoundError
from devec.decomposition.stacks import sound
from devec.decomposition.weighted_mean import WeightedMean
from devec.deltas.delta import Delta
from devec.linalg.chance import chance_level, pool_level, random_edge
from devec.linalg.subspaces import METHODS, SharedSubspace, deflate, shared_by_all

# Differences of squares of norms are known to this fraction of the squares.
_SURE = 1e-4


@dataclass(frozen=True)
class _Bases:
    """The bases of a group, which a stack computes when they are asked for.

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
            yield self.stack.basis(name) if self.index is None else self._one(name)

    def _one(self, name: str) -> Tensor:
        return self.stack.basis(name)[self.index or 0]


class _Group:
    """What a group of adapters shares in the modules of a stack, and sums over its adapters."""

    def __init__(self, question: Question, stack: Stack, names: Sequence[str]) -> None:
        """Find what the group shares, by the method asked for (Eq. 8-11)."""
        self.question, self.stack, self.names = question, stack, names
        self.found = _shared_subspace(question, stack, names)
        self.counts: list[int] = self.found.counts.tolist()
        self.shared_norms: list[list[float]] = []
        self._mean = WeightedMean(len(self.counts))

    def parts(self, name: str) -> tuple[list[Delta | None], list[Delta]]:
        """The shared and the unique parts of an adapter, which the common vector takes up."""
        if not any(self.counts):
            self.shared_norms.append([0.0] * len(self.counts))
            return [None] * len(self.counts), self.stack.unchanged(name)
        made = self.stack.projected(name, self.found.basis, self.counts)
        self.shared_norms.append(made.norms)
        self._mean.add(made.coordinates, made.exponents, made.norms, made.shared)
        return made.shared, made.unique

    def common(self) -> list[Delta | None]:
        """The common vectors (Eq. 14), None where nothing is shared."""
        result: list[Delta | None] = []
        for index, count in enumerate(self.counts):
            Z = self.found.basis[index, :, :count].to(self.stack.dtype)
            mean = self._mean.of(index, Z) if count else None
            result.append(None if mean is None else self.stack.released(mean))
        return result

    def rows(self) -> Iterator[ModuleSplit]:
        """The rows of the report, once all adapters were gone through."""
        ranks = [self.stack.rank(name) for name in self.names]
        norms = [self.stack.norms(name) for name in self.names]
        for index in range(len(self.counts)):
            yield row_of(
                self.question,
                self.stack.modules[index],
                self.names,
                ranks,
                _at(self.found, index),
                [of_all[index] for of_all in norms],
                [of_all[index] for of_all in self.shared_norms],
            )


def _shared_subspace(question: Question, stack: Stack, names: Sequence[str]) -> SharedSubspace:
    """The subspaces that the adapters of a group share, by the method asked for."""
    bases = _Bases(stack, names)

    def level() -> float:
        ranks = [stack.rank(name) for name in names]
        return question.level(stack.rows, ranks) if all(ranks) else math.inf

    found = METHODS[question.method](bases, level)
    if not all(stack.rank(name) for name in names):  # nothing can be shared with zero
        return dataclasses.replace(found, spectrum=found.spectrum[..., :0])
    if question.threshold != "auto" or len(names) <= 2:
        return found
    return shared_by_all(found, bases, _chance_of_one)


def _chance_of_one(n: int, rank: int) -> float:
    """The squared cosine that a random direction and a subspace rarely exceed."""
    return chance_level(n, rank, 1)


def _at(found: SharedSubspace, index: int) -> SharedSubspace:
    """What was found in one module of a stack."""
    count, spectrum = found.counts[index], found.spectrum[index]
    return dataclasses.replace(
        found,
        basis=found.basis[index, :, : int(count)],
        spectrum=spectrum[spectrum != 0] if found.padded else spectrum,
        counts=count,
    )


def row_of(
    question: Question,
    module: str,
    group: Sequence[str],
    ranks: Sequence[int],
    found: SharedSubspace,
    norms: Sequence[float],
    shared_norms: Sequence[float],
) -> ModuleSplit:
    """The row of the report for a group.

    Args:
        question: What was asked.
        module: The module.
        group: The adapters.
        ranks: Dimensions of their column spaces.
        found: What they share.
        norms: Norms of their deltas.
        shared_norms: Norms of the shared parts.

    Returns:
        The row.
    """
    n = len(found.basis)
    return ModuleSplit(
        module=module,
        group=tuple(group),
        ranks=tuple(ranks),
        threshold=question.level(n, ranks),
        edge=pool_level(n, ranks, question.method, random_edge),
        spectrum=found.spectrum.cpu(),
        quantity=found.quantity,
        basis=found.basis.cpu(),
        norms=tuple(norms),
        shared_norms=tuple(shared_norms),
    )


def nothing_of(delta: Delta) -> Delta:
    """The zero that is the shared part of a delta where nothing is shared."""
    if delta.gain is not None:
        return Delta(delta.B[:, :0], delta.A[:0])
    bias = None if delta.bias is None else torch.zeros_like(delta.bias)
    return dataclasses.replace(delta, B=torch.zeros_like(delta.B), bias=bias)


def _rest_norms(
    norms: Sequence[float], shared: Sequence[float], rest: Sequence[Delta]
) -> list[float]:
    """‖ΔW - shared‖_F of each module: by Pythagoras, and measured where squares lose it."""
    result = []
    for norm, part, delta in zip(norms, shared, rest, strict=True):
        fraction = 1 - (part / norm) ** 2 if norm else 0.0
        lost = not fraction > _SURE and delta.gain is None
        result.append(delta.weight_norm() if lost else norm * math.sqrt(max(0.0, fraction)))
    return result


def split_all(question: Question, stack: Stack, found: Findings) -> Iterator[Part]:
    """Scope ``all``: one shared subspace for the whole pool (Eq. 8-14)."""
    everywhere = len(stack.names) == len(question.names)
    group = _Group(question, stack, stack.names) if everywhere else None
    for name in stack.names:
        shared: Sequence[Delta | None] = [None] * len(stack.modules)
        unique: Sequence[Delta] = []
        if group is not None:
            shared, unique = group.parts(name)
        found.add_norms(name, stack)
        norms = [0.0] * len(shared) if group is None else group.shared_norms[-1]
        unique = unique or stack.unchanged(name)
        rest = _rest_norms(stack.norms(name), norms, unique)
        yield Part("unique", name, stack.named(unique), rest)
        unique = []  # nothing is held that is not needed any more
        yield Part("shared", name, stack.named(shared), norms)
        shared = []
    if group is not None:
        yield Part("common", "", stack.named(group.common()))
        found.rows += group.rows()


def split_pairs(question: Question, stack: Stack, found: Findings) -> Iterator[Part]:
    """Scope ``pairwise``: a common vector for every pair (Eq. 8-14 with k = 2)."""
    stack.keep_bases()  # of which each is needed once for every other adapter
    for name in stack.names:
        found.add_bias_norms(name, stack)
    for pair in combinations(question.names, 2):
        if all(name in stack.names for name in pair):
            group = _Group(question, stack, pair)
            for name in pair:
                group.parts(name)
            yield Part("shared", "+".join(pair), stack.named(group.common()))
            found.rows += group.rows()


def split_target(question: Question, stack: Stack, found: Findings) -> Iterator[Part]:
    """Scope ``iterative``: the target loses what it shares with each of the others in turn.

    Args:
        question: What is asked.
        stack: One module.
        found: Takes up rows and norms.

    Yields:
        The unique and the shared part of the target.
    """
    target = question.target
    if target not in stack.names:
        return
    others = [name for name in question.names if name != target and name in stack.names]
    U = stack.basis(target)[0]
    found.add_norms(target, stack)
    steps = deflate(U, _Bases(stack, others, 0), lambda p, q: question.level(len(U), (p, q)))
    left = U.shape[1]
    for other, step in zip(others, steps, strict=True):
        group = (target, other)
        ranks = (left, stack.rank(other))
        counts = [step.rank]
        norms = [stack.norms(name)[0] for name in group]
        held = [
            stack.projected(name, step.basis[None], counts).norms[0] if step.rank else 0.0
            for name in group
        ]
        found.rows.append(row_of(question, stack.modules[0], group, ranks, step, norms, held))
        left -= step.rank
    Z = torch.cat([U[:, :0], *(step.basis for step in steps)], dim=1)
    shared: Sequence[Delta | None] = [None]
    unique: Sequence[Delta] = stack.unchanged(target)
    norms = [0.0]
    if Z.shape[1]:
        shared, unique, *_, norms = stack.projected(target, Z[None], [Z.shape[1]])
    rest = _rest_norms(stack.norms(target), norms, unique)
    yield Part("unique", target, stack.named(unique), rest)
    yield Part("shared", target, stack.named(shared), norms)


SCOPES: dict[str, Callable[[Question, Stack, Findings], Iterator[Part]]] = {
    "all": split_all,
    "pairwise": split_pairs,
    "iterative": split_target,
}


def split(question: Question, stack: Stack, found: Findings) -> Iterator[Part]:
    """The parts of the modules of a stack; those that are unsound together, one by one.

    Args:
        question: What is asked.
        stack: The modules.
        found: Takes up rows and norms.

    Yields:
        The parts, an adapter at a time.
    """
    pending = [stack]
    while pending:
        stack = pending.pop()
        try:
            with stack.located():
                yield from SCOPES[question.scope](question, stack, found)
        except UnsoundError as error:
            pending += sound(stack, error.modules)
