"""Adapters of lower rank: the best there are, with their error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from devec.adapter import Adapter
from devec.algebra import provenance
from devec.delta import Delta
from devec.errors import IncompatibleError, located
from devec.linalg import rank_for_energy


@dataclass(frozen=True, eq=False)
class Compression:
    """An adapter of lower rank and what was lost.

    Attributes:
        adapter: The compressed adapter.
        errors: Module → ‖ΔW - ΔW'‖_F/‖ΔW‖_F; 0 for a zero delta.
        error: The same for the whole adapter.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float


def compress(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> Compression:
    """The best approximation of an adapter by one of lower rank, module by module.

    Args:
        adapter: The adapter; carried tensors and bias changes are kept whole.
        rank: Largest rank of any module, at least 1. Modules of less rank keep theirs.
        energy: Fraction of the squared Frobenius norm that every module keeps, in (0, 1], by the
            smallest rank that does. Exactly one of `rank` and `energy` is given.

    Returns:
        The compressed adapter and the relative errors: √(Σ of the squared singular values cut
        off)/‖ΔW‖, the least that any adapter of these ranks can have. Modules of rank 0 are left
        out.

    Raises:
        IncompatibleError: If the arguments are out of range.

    Cost: O((out + in)·r²) a module.

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    if (rank is None) == (energy is None):
        got = "neither" if rank is None else "both"
        raise IncompatibleError(f"give one of rank (--rank) and energy (--energy), got {got}")
    if rank is not None and rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise IncompatibleError(f"energy must be in (0, 1], got {energy}")
    # A module of less rank than asked for keeps its own: rounding is not worth a column.
    kept = 1.0 if energy is None else energy

    def choose(_: str, S: Tensor) -> int:
        own = rank_for_energy(S, kept)
        return own if rank is None else min(rank, own)

    result = truncate(adapter, choose)
    record = provenance(
        "compress", [adapter], rank=rank, energy=energy, relative_error=result.error
    )
    return dataclasses.replace(
        result, adapter=dataclasses.replace(result.adapter, provenance=record)
    )


def truncate(adapter: Adapter, choose: Callable[[str, Tensor], int]) -> Compression:
    """Cut every module at the rank chosen from its name and singular values.

    Args:
        adapter: The adapter.
        choose: From module name and singular values (descending) to the rank to keep.

    Returns:
        The truncated adapter, factors balanced (U·√S, √S·Vᵀ) and scaling 1, and its errors.
        Modules of rank 0 without a bias change are left out.
    """
    modules: dict[str, Delta] = {}
    lost: dict[str, float] = {}
    norms: dict[str, float] = {}
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            U, S, Vh = delta.svd()
            rank = choose(module, S)
            root = S[:rank].sqrt()
            bias = None if delta.bias is None else delta.folded().bias
            if rank or bias is not None:
                B, A = (U[:, :rank] * root).to(delta.dtype), (root[:, None] * Vh[:rank])
                modules[module] = Delta(B=B, A=A.to(delta.dtype), bias=bias)
            norms[module], lost[module] = float(S.norm()), float(S[rank:].norm())
    return Compression(
        adapter=dataclasses.replace(adapter, modules=modules, source="", sha256=""),
        errors={m: lost[m] / norms[m] if norms[m] else 0.0 for m in norms},
        error=math.hypot(*lost.values()) / (math.hypot(*norms.values()) or 1.0),
    )
