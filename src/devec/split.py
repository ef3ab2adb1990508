"""One module of a pool: its column spaces, what they share, and the parts that follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from devec.delta import Delta
from devec.joint import base_of, resolved_together
from devec.linalg import ColumnSpace, column_space, working_dtype
from devec.subspace import (
    METHODS,
    SharedSubspace,
    chance_level,
    deflate,
    held_by_all,
    pool_level,
    random_edge,
)

Threshold = float | Literal["auto"]


@dataclass(frozen=True, eq=False)
class ModuleSplit:
    """What was found in one module for one group of adapters.

    Attributes:
        module: Name of the module.
        group: Names of the adapters whose subspaces were compared, in order.
        ranks: Dimension of each adapter's column space (for scope ``"iterative"``, of what was
            left of the target's).
        threshold: The squared cosine that counted as shared; infinity where no overlap can be
            beyond chance (``threshold="auto"`` and ranks that fill the space).
        edge: The value that random subspaces of these dimensions reach.
        spectrum: What the threshold was compared with, descending.
        quantity: What that is: ``"cos²"``, or ``"eigenvalue"`` for a chain of three or more.
        basis: Z, orthonormal basis of the shared subspace, shape (out, shared rank).
        norms: For each adapter of the group, ‖ΔW‖_F.
        shared_norms: For each adapter of the group, ‖Z Zᵀ ΔW‖_F.
    """

    module: str
    group: tuple[str, ...]
    ranks: tuple[int, ...]
    threshold: float
    edge: float
    spectrum: Float[Tensor, " k"]
    quantity: str
    basis: Float[Tensor, "out shared"]
    norms: tuple[float, ...]
    shared_norms: tuple[float, ...]

    @property
    def shared_rank(self) -> int:
        """The number of shared directions."""
        return self.basis.shape[1]

    @property
    def largest(self) -> float:
        """The largest overlap found, on the scale of squared cosines; 0 without any."""
        return float(self.spectrum[0]) if self.spectrum.numel() else 0.0


@dataclass
class ModuleParts:
    """The parts of one module, by the name of the adapter or pair they belong to.

    Attributes:
        shared: Shared parts.
        unique: Unique parts.
        common: The common vector of the pool.
        splits: What was found.
        norms: ‖ΔW‖_F of the originals that were split.
    """

    shared: dict[str, Delta] = field(default_factory=dict)
    unique: dict[str, Delta] = field(default_factory=dict)
    common: Delta | None = None
    splits: list[ModuleSplit] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)

    def map(self, change: Callable[[Delta], Delta]) -> ModuleParts:
        """The same parts with every delta replaced."""
        return ModuleParts(
            shared={name: change(delta) for name, delta in self.shared.items()},
            unique={name: change(delta) for name, delta in self.unique.items()},
            common=None if self.common is None else change(self.common),
            splits=self.splits,
            norms=self.norms,
        )


@dataclass(frozen=True)
class Question:
    """What is asked of every module: which directions count as shared, and among whom.

    Attributes:
        names: Names of the adapters of the pool, in order.
        threshold: Smallest squared cosine that counts as shared, or ``"auto"``.
        method: A key of `METHODS`.
        target: Name of the adapter to split, for scope ``"iterative"``.
    """

    names: tuple[str, ...]
    threshold: Threshold
    method: str
    target: str = ""

    def level(self, n: int, ranks: Sequence[int]) -> float:
        """The threshold for subspaces of these dimensions."""
        if self.threshold != "auto":
            return self.threshold
        return pool_level(n, ranks, self.method, chance_level) if all(ranks) else math.inf


class ModulePool:
    """One module of all the adapters that have it.

    A base weight that DoRAs need is read once and held for as long as the pool is; `released` parts
    no longer hold it.

    Args:
        module: Name of the module.
        deltas: Adapter name → delta, where it is to be computed.
    """

    def __init__(self, module: str, deltas: Mapping[str, Delta]) -> None:
        """Find the column spaces of the deltas' low-rank parts."""
        self.module = module
        self.as_read = deltas
        self.base = base_of(deltas.values())
        self.deltas = resolved_together(deltas)
        self.spaces: dict[str, ColumnSpace] = {
            name: column_space(delta.B if delta.scaling else 0 * delta.B, delta.A)
            for name, delta in self.deltas.items()
        }
        self.norms = {
            name: delta.weight_norm(abs(delta.scaling) * float(self.spaces[name].S.norm()))
            for name, delta in self.deltas.items()
        }

    def released(self, delta: Delta) -> Delta:
        """A part without the base weight that is held here."""
        return delta if self.base is None else delta.on(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which all the deltas can be combined."""
        return working_dtype(*(f for delta in self.as_read.values() for f in (delta.B, delta.A)))

    def shared_subspace(self, question: Question, group: Sequence[str]) -> SharedSubspace:
        """The subspace that the deltas of a group share, by the method asked for."""
        bases = [self.spaces[name].U for name in group]
        ranks = [basis.shape[1] for basis in bases]
        if not all(ranks):
            return SharedSubspace(bases[0][:, :0], bases[0].new_zeros(0))
        found = METHODS[question.method](bases, question.level(len(bases[0]), ranks))
        if question.threshold == "auto" and len(group) > 2:
            return held_by_all(found, bases, lambda n, rank: chance_level(n, rank, 1))
        return found

    def parts(self, group: Sequence[str], Z: Float[Tensor, "out k"]) -> dict[str, Delta]:
        """The shared part of every delta of a group (Eq. 12)."""
        return {name: self.deltas[name].projected(Z) for name in group}

    def whole(self, name: str) -> tuple[Delta, Delta]:
        """Zero, and the delta as it was read: the parts where nothing is shared."""
        delta = self.as_read[name]
        if delta.gain is not None:
            return Delta(delta.B[:, :0], delta.A[:0]), delta
        bias = None if delta.bias is None else torch.zeros_like(delta.bias)
        return dataclasses.replace(delta, B=torch.zeros_like(delta.B), bias=bias), delta

    def shared_norm(self, name: str, Z: Float[Tensor, "out k"], part: Delta) -> float:
        """‖Z Zᵀ ΔW‖_F: of a LoRA |s|·‖(ZᵀU)·diag(S)‖_F, of a DoRA the norm of its part Z·C."""
        delta, space = self.deltas[name], self.spaces[name]
        if delta.gain is not None:
            return float(torch.linalg.matrix_norm(part.A))
        return abs(delta.scaling) * float(((Z.mT @ space.U) * space.S).norm())

    def common(
        self, parts: Mapping[str, Delta], Z: Float[Tensor, "out k"], norms: Sequence[float]
    ) -> Delta:
        """Mean of the shared parts of a group, weighted by their norms (Eq. 14).

        Z·(Σ w_i·Zᵀ·shared_i) with w_i = ‖shared_i‖/Σ_j ‖shared_j‖.

        Returns:
            The common vector, of rank ρ_shared and scaling 1.
        """
        total = math.fsum(norms) or 1.0
        Z = Z.to(self.dtype)
        columns = next(iter(parts.values())).shape[1]
        A = torch.zeros(Z.shape[1], columns, dtype=self.dtype, device=Z.device)
        bias = None
        for part, norm in zip(parts.values(), norms, strict=True):
            A.add_(part.coordinates(Z), alpha=norm / total)
            if part.bias is not None:
                weighted = norm / total * part.scaling * part.bias.to(self.dtype)
                bias = weighted if bias is None else bias + weighted
        return Delta(B=Z, A=A, bias=bias)

    def row(
        self,
        question: Question,
        group: Sequence[str],
        found: SharedSubspace,
        shared_norms: Sequence[float],
        ranks: Sequence[int] = (),
    ) -> ModuleSplit:
        """The row of the report for a group."""
        n = len(found.basis)
        ranks = ranks or [self.spaces[name].U.shape[1] for name in group]
        return ModuleSplit(
            module=self.module,
            group=tuple(group),
            ranks=tuple(ranks),
            threshold=question.level(n, ranks),
            edge=pool_level(n, ranks, question.method, random_edge),
            spectrum=found.spectrum.cpu(),
            quantity=found.quantity,
            basis=found.basis.cpu(),
            norms=tuple(self.norms[name] for name in group),
            shared_norms=tuple(shared_norms),
        )

    def compare(
        self, question: Question, group: Sequence[str]
    ) -> tuple[ModuleSplit, dict[str, Delta], Delta | None]:
        """What a group shares: the row of the report, the shared parts, the common vector.

        Returns:
            All three; without parts and common vector where nothing is shared (Eq. 8-14).
        """
        found = self.shared_subspace(question, group)
        Z = found.basis
        parts = self.parts(group, Z) if found.rank else {}
        norms = [self.shared_norm(n, Z, parts[n]) if parts else 0.0 for n in group]
        common = self.common(parts, Z, norms) if parts else None
        return self.row(question, group, found, norms), parts, common


def split_all(question: Question, pool: ModulePool) -> ModuleParts:
    """Scope ``all``: one shared subspace for the whole pool (Eq. 8-14)."""
    parts = ModuleParts()
    shared: dict[str, Delta] = {}
    if len(pool.deltas) == len(question.names):
        row, shared, parts.common = pool.compare(question, question.names)
        parts.splits.append(row)
    for name, delta in pool.deltas.items():
        part, parts.norms[name] = shared.get(name), pool.norms[name]
        parts.shared[name], parts.unique[name] = (
            pool.whole(name) if part is None else (part, delta.without(part))
        )
    return parts


def split_pairs(question: Question, pool: ModulePool) -> ModuleParts:
    """Scope ``pairwise``: a common vector for every pair (Eq. 8-14 with k = 2)."""
    parts = ModuleParts()
    for pair in combinations(question.names, 2):
        if all(name in pool.deltas for name in pair):
            row, _, common = pool.compare(question, pair)
            parts.splits.append(row)
            if common is not None:
                parts.shared["+".join(pair)] = common
    return parts


def split_target(question: Question, pool: ModulePool) -> ModuleParts:
    """Scope ``iterative``: the target loses what it shares with each of the others in turn."""
    parts = ModuleParts()
    target = question.target
    if target not in pool.deltas:
        return parts
    others = [name for name in question.names if name != target and name in pool.deltas]
    U = pool.spaces[target].U
    steps = deflate(
        U, [pool.spaces[o].U for o in others], lambda p, q: question.level(len(U), (p, q))
    )
    left = U.shape[1]
    for other, found in zip(others, steps, strict=True):
        group = (target, other)
        held = pool.parts(group, found.basis)
        norms = [pool.shared_norm(name, found.basis, part) for name, part in held.items()]
        ranks = (left, pool.spaces[other].U.shape[1])
        parts.splits.append(pool.row(question, group, found, norms, ranks))
        left -= found.rank
    Z = torch.cat([U[:, :0], *(found.basis for found in steps)], dim=1)
    delta, parts.norms[target] = pool.deltas[target], pool.norms[target]
    part = delta.projected(Z) if Z.shape[1] else None
    parts.shared[target], parts.unique[target] = (
        pool.whole(target) if part is None else (part, delta.without(part))
    )
    return parts


SCOPES: dict[str, Callable[[Question, ModulePool], ModuleParts]] = {
    "all": split_all,
    "pairwise": split_pairs,
    "iterative": split_target,
}
