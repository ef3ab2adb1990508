"""Adapters of lower rank: the best there are, with their error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import provenance
from devec.arguments import number, whole_number
from devec.deltas.delta import Delta
from devec.deltas.gains import Gain
from devec.deltas.sums import resolve_together
from devec.errors import IncompatibleError, located
from devec.linalg.batched import factored_svd
from devec.linalg.dtypes import RANK_RTOL
from devec.linalg.factors import numerical_rank, rank_for_energy
from devec.linalg.precision import full_precision


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
        rank: Largest rank of any module, at least 1. Modules of less rank keep theirs: singular
            values below 1e-6 of the largest are rounding (1e-12 in float64).
        energy: Fraction of the squared Frobenius norm of ΔW that the error of every module leaves,
            in (0, 1], by the smallest rank that does. Exactly one of `rank` and `energy` is given.

    Returns:
        The compressed adapter and the relative errors: √(Σ of the squared singular values cut
        off)/‖ΔW‖, the least that any adapter of these ranks can have, of DoRAs the least that any
        with the same gains can have. Modules of rank 0 are left out.

    Raises:
        IncompatibleError: If the arguments are out of range.

    Cost: O((out + in)·r²) a module; of a DoRA O(out·in·r), its base weight is read.

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    if (rank is None) == (energy is None):
        got = "neither" if rank is None else "both"
        raise IncompatibleError(f"give one of rank (--rank) and energy (--energy), got {got}")
    rank = None if rank is None else whole_number(rank, "rank")
    energy = None if energy is None else number(energy, "energy")
    if rank is not None and rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise IncompatibleError(f"energy must be in (0, 1], got {energy}")
    kept = 1.0 if energy is None else energy

    def choose(_: str, S: Tensor, norm: float) -> int:
        own = rank_for_energy(S, kept, norm)
        return own if rank is None else min(rank, own)

    result = truncate_adapter(adapter, choose)
    record = provenance(
        "compress", [adapter], rank=rank, energy=energy, relative_error=result.error
    )
    return dataclasses.replace(
        result, adapter=dataclasses.replace(result.adapter, provenance=record)
    )


@full_precision
def truncate_adapter(adapter: Adapter, choose: Callable[[str, Tensor, float], int]) -> Compression:
    """Cut every module at the rank chosen from its name, singular values and norm.

    Args:
        adapter: The adapter.
        choose: From module name, singular values of the low-rank part (descending) and ‖ΔW‖ to the
            rank to keep.

    Returns:
        The truncated adapter, factors balanced (U·√S, √S·Vᵀ) and scaling 1, and its errors.
        Modules of rank 0 without gains or a bias change are left out.
    """
    cut: dict[str, TruncatedDelta] = {}
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            cut[module] = truncate_delta(delta, lambda S, norm: choose(module, S, norm))  # noqa: B023
    return compression_of(adapter, cut)


class TruncatedDelta(NamedTuple):
    """What became of a module.

    Attributes:
        delta: What is left of it; None if nothing is.
        lost: ‖ΔW - ΔW'‖_F.
        norm: ‖ΔW‖_F.
    """

    delta: Delta | None
    lost: float
    norm: float


def compression_of(adapter: Adapter, cuts: Mapping[str, TruncatedDelta]) -> Compression:
    """The compression that consists of the cuts of all modules."""
    lost, norms = ([getattr(cut, name) for cut in cuts.values()] for name in ("lost", "norm"))
    modules = {m: cut.delta for m, cut in cuts.items() if cut.delta is not None}
    return Compression(
        adapter=dataclasses.replace(adapter, modules=modules, source="", sha256=""),
        errors={m: cut.lost / cut.norm if cut.norm else 0.0 for m, cut in cuts.items()},
        error=math.hypot(*lost) / (math.hypot(*norms) or 1.0),
    )


@full_precision
def truncate_delta(original: Delta, choose: Callable[[Tensor, float], int]) -> TruncatedDelta:
    """A delta at a lower rank; of a DoRA the gains are kept and the low-rank part is cut.

    Args:
        original: The delta.
        choose: From the singular values of the low-rank part (descending) and ‖ΔW‖ to the rank.

    Returns:
        The delta, at no more than its numerical rank, factors balanced and scaling 1; none if
        nothing is left of it.
    """
    delta = resolve_together({"": original})[""]
    found = factored_svd(delta.folded().B, delta.A)
    S = found.S
    norm = delta.weight_norm(float(S.norm()))
    rank = min(choose(S, norm), numerical_rank(S, RANK_RTOL[delta.dtype]))
    lost = float(S[rank:].norm())
    bias = None if delta.bias is None else delta.folded().bias
    if not (rank or bias is not None or isinstance(delta.gain, Gain)):
        return TruncatedDelta(None, lost, norm)
    B, A = (factor.to(delta.dtype) for factor in found.leading(rank))
    gain = None
    if isinstance(delta.gain, Gain) and original.gain is not None:
        gain = dataclasses.replace(delta.gain.beside(B, A), base=original.gain.base)
    return TruncatedDelta(Delta(B, A, bias=bias, gain=gain), lost, norm)
