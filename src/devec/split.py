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
    """The parts of one module, by the name of the adapter or pair they belong to."""

    shared: dict[str, Delta] = field(default_factory=dict)
    unique: dict[str, Delta] = field(default_factory=dict)
    common: Delta | None = None
    splits: list[ModuleSplit] = field(default_factory=list)


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

    Args:
        module: Name of the module.
        deltas: Adapter name → delta, where it is to be computed.
    """

    def __init__(self, module: str, deltas: Mapping[str, Delta]) -> None:
        """Find the column spaces of the deltas."""
        self.module = module
        self.deltas = deltas
        self.spaces: dict[str, ColumnSpace] = {
            name: column_space(delta.B if delta.scaling else 0 * delta.B, delta.A)
            for name, delta in deltas.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which all the deltas can be combined."""
        return working_dtype(*(f for delta in self.deltas.values() for f in (delta.B, delta.A)))

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

    def split(self, name: str, Z: Float[Tensor, "out k"]) -> tuple[Delta, Delta]:
        """Shared and unique part of one delta (Eq. 12 and 13); the original where Z is empty."""
        delta = self.deltas[name]
        if Z.shape[1] == 0:
            bias = None if delta.bias is None else torch.zeros_like(delta.bias)
            return dataclasses.replace(delta, B=torch.zeros_like(delta.B), bias=bias), delta
        shared = delta.projected(Z)
        return shared, delta.without(shared)

    def norm(self, name: str) -> float:
        """‖ΔW‖_F, from the singular values."""
        return abs(self.deltas[name].scaling) * float(self.spaces[name].S.norm())

    def shared_norms(self, group: Sequence[str], Z: Float[Tensor, "out k"]) -> list[float]:
        """‖Z Zᵀ ΔW_i‖_F = |s_i|·‖(ZᵀU_i)·diag(S_i)‖_F of the adapters of a group."""
        return [
            abs(self.deltas[name].scaling) * float(((Z.mT @ space.U) * space.S).norm())
            for name, space in ((name, self.spaces[name]) for name in group)
        ]

    def common(
        self, group: Sequence[str], Z: Float[Tensor, "out k"], norms: Sequence[float]
    ) -> Delta:
        """Mean of the shared parts of a group, weighted by their norms (Eq. 14).

        Z·(Σ w_i·s_i·(ZᵀB_i)·A_i) with w_i = ‖shared_i‖/Σ_j ‖shared_j‖.

        Returns:
            The common vector, of rank ρ_shared and scaling 1.
        """
        deltas = [self.deltas[name] for name in group]
        dtype = self.dtype
        total = math.fsum(norms) or 1.0
        Z = Z.to(dtype)
        A = torch.zeros(Z.shape[1], deltas[0].shape[1], dtype=dtype, device=Z.device)
        bias = None
        for delta, norm in zip(deltas, norms, strict=True):
            weight = norm / total * delta.scaling
            A.addmm_(Z.mT @ delta.B.to(dtype), delta.A.to(dtype), alpha=weight)
            if delta.bias is not None:
                part = weight * (Z @ (Z.mT @ delta.bias.to(dtype)))
                bias = part if bias is None else bias + part
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
            norms=tuple(self.norm(name) for name in group),
            shared_norms=tuple(shared_norms),
        )

    def compare(self, question: Question, group: Sequence[str]) -> tuple[ModuleSplit, Delta | None]:
        """What a group shares: the row of the report and the common vector, if any (Eq. 8-14)."""
        found = self.shared_subspace(question, group)
        norms = self.shared_norms(group, found.basis)
        common = self.common(group, found.basis, norms) if found.rank else None
        return self.row(question, group, found, norms), common


def split_all(question: Question, pool: ModulePool) -> ModuleParts:
    """Scope ``all``: one shared subspace for the whole pool (Eq. 8-14)."""
    parts = ModuleParts()
    Z = next(iter(pool.spaces.values())).U[:, :0]
    if len(pool.deltas) == len(question.names):
        row, parts.common = pool.compare(question, question.names)
        parts.splits.append(row)
        Z = row.basis.to(Z.device, pool.dtype)
    for name in pool.deltas:
        parts.shared[name], parts.unique[name] = pool.split(name, Z)
    return parts


def split_pairs(question: Question, pool: ModulePool) -> ModuleParts:
    """Scope ``pairwise``: a common vector for every pair (Eq. 8-14 with k = 2)."""
    parts = ModuleParts()
    for pair in combinations(question.names, 2):
        if all(name in pool.deltas for name in pair):
            row, common = pool.compare(question, pair)
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
        norms = pool.shared_norms(group, found.basis)
        ranks = (left, pool.spaces[other].U.shape[1])
        parts.splits.append(pool.row(question, group, found, norms, ranks))
        left -= found.rank
    Z = torch.cat([U[:, :0], *(found.basis for found in steps)], dim=1)
    parts.shared[target], parts.unique[target] = pool.split(target, Z)
    return parts


SCOPES: dict[str, Callable[[Question, ModulePool], ModuleParts]] = {
    "all": split_all,
    "pairwise": split_pairs,
    "iterative": split_target,
}
