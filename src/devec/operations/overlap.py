"""How much adapters overlap, compared with random subspaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from jaxtyping import Float
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import cosine_of, on_common_modules
from devec.adapters.pool import require_distinct_names, warn_if_unrelated
from devec.deltas.delta import Delta
from devec.deltas.sums import resolve_together
from devec.errors import IncompatibleError, located
from devec.linalg.chance import random_edge
from devec.linalg.factors import ColumnSpace
from devec.linalg.precision import full_precision
from devec.linalg.subspaces import principal_vectors


@dataclass(frozen=True, eq=False)
class ModuleOverlap:
    """The overlap of two adapters in one module.

    Attributes:
        module: Name of the module.
        pair: Names of the two adapters.
        ranks: Numerical ranks of the two deltas.
        squared_cosines: Squared cosines of the principal angles between the column spaces,
            descending, in [0, 1], shape (min(ranks),), on the CPU.
        edge: Random edge: asymptotic largest squared cosine of random subspaces of these ranks.
        inner: ⟨ΔW1, ΔW2⟩_F, with the bias changes.
        cosine: ⟨ΔW1, ΔW2⟩/(‖ΔW1‖·‖ΔW2‖), in [-1, 1]; nan if either is zero.

    Example:
        >>> import torch, devec
        >>> deltas = [devec.Delta(torch.eye(8)[:, i : i + 2], torch.eye(2, 6)) for i in (0, 1)]
        >>> pool = [devec.Adapter(n, {"q_proj": d}) for n, d in zip("ab", deltas)]
        >>> (row,) = devec.overlap(pool).modules
        >>> row.squared_cosines.round(decimals=6).tolist(), round(row.edge, 4)
        ([1.0, 0.0], 0.75)
    """

    module: str
    pair: tuple[str, str]
    ranks: tuple[int, int]
    squared_cosines: Float[Tensor, " k"]
    edge: float
    inner: float
    cosine: float

    @property
    def largest(self) -> float:
        """The largest squared cosine; 0 if either delta is zero."""
        return float(self.squared_cosines[0]) if self.squared_cosines.numel() else 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Overlap:
    """The overlaps of all pairs of a pool.

    Attributes:
        modules: One entry for every pair and every module of both.
        cosines: Pair of names → cosine of the whole adapters as vectors, in [-1, 1].

    Example:
        >>> import torch, devec
        >>> delta = devec.Delta(torch.ones(8, 1), torch.ones(1, 6))
        >>> found = devec.overlap([devec.Adapter(n, {"q_proj": delta}) for n in "abc"])
        >>> len(found.modules), list(found.cosines)
        (3, [('a', 'b'), ('a', 'c'), ('b', 'c')])
    """

    modules: Sequence[ModuleOverlap]
    cosines: dict[tuple[str, str], float]

    def __repr__(self) -> str:
        return f"Overlap({len(self.modules)} rows, cosines={self.cosines})"


@full_precision
def overlap(adapters: Sequence[Adapter]) -> Overlap:
    """Measure how much adapters overlap, pair by pair.

    The squared cosines of the principal angles between the column spaces of ΔW1 and ΔW2 are the
    squared singular values of U1ᵀU2, with orthonormal bases U1 and U2. The column space of a DoRA
    is that of its low-rank part D·s·B·A; inner products and cosines are those of the whole deltas.

    Args:
        adapters: Two or more adapters of one base model, with distinct names.

    Returns:
        Squared cosines of the principal angles for every pair and module, with the random edge, and
        the cosines between deltas and between whole adapters. Exact to rounding.

    Raises:
        IncompatibleError: If there are fewer than two adapters or they do not fit together.

    Cost: O((out + in)·r²) for each adapter and module, O(out·r²) for each pair and module.

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces"; Wachter 1980 for the edge.

    Example:
        >>> import torch, devec
        >>> delta = devec.Delta(torch.ones(8, 1), torch.ones(1, 6))
        >>> found = devec.overlap([devec.Adapter(n, {"q_proj": delta}) for n in "ab"])
        >>> round(found.modules[0].largest, 6), round(found.cosines["a", "b"], 6)
        (1.0, 1.0)
    """
    require_distinct_names(adapters)
    if len(adapters) < 2:
        raise IncompatibleError(f"overlap needs at least two adapters, got {len(adapters)}")
    adapters = on_common_modules(adapters)
    warn_if_unrelated(adapters)
    rows: list[ModuleOverlap] = []
    norms: dict[str, list[float]] = {adapter.name: [] for adapter in adapters}
    for module in dict.fromkeys(m for a in adapters for m in a.modules):
        deltas = {a.name: a.modules[module] for a in adapters if module in a.modules}
        with located(f"module {module!r}"):
            deltas = resolve_together(deltas)
            own = {name: delta.norm() for name, delta in deltas.items()}
            rows += _module_rows(module, deltas, own)
        for name, norm in own.items():
            norms[name].append(norm)
    pairs = combinations(norms, 2)
    return Overlap(rows, {pair: _whole_cosine(pair, rows, norms) for pair in pairs})


def _whole_cosine(
    pair: tuple[str, str], rows: Sequence[ModuleOverlap], norms: Mapping[str, Sequence[float]]
) -> float:
    """The cosine of two whole adapters, from inner products and norms of their modules."""
    inner = math.fsum(row.inner for row in rows if row.pair == pair)
    return cosine_of(inner, *(math.hypot(*norms[name]) for name in pair))


def _module_rows(
    module: str, deltas: Mapping[str, Delta], norms: Mapping[str, float]
) -> list[ModuleOverlap]:
    """The overlaps of all pairs in one module."""
    spaces: dict[str, ColumnSpace] = {}
    for name, delta in deltas.items():
        with located(repr(name)):
            spaces[name] = delta.column_space()
    rows = []
    for a, b in combinations(deltas, 2):
        U, V = spaces[a].U, spaces[b].U
        inner = deltas[a].inner(deltas[b])
        rows.append(
            ModuleOverlap(
                module=module,
                pair=(a, b),
                ranks=(U.shape[1], V.shape[1]),
                squared_cosines=principal_vectors(U, V)[1].square().cpu(),
                edge=random_edge(len(U), U.shape[1], V.shape[1]),
                inner=inner,
                cosine=cosine_of(inner, norms[a], norms[b]),
            )
        )
    return rows
