"""Best approximation of adapters by adapters of lower rank, with the error."""

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
    """Result of `compress` and `as_lora`: an approximation of an adapter and its relative errors.

    Attributes:
        adapter: The approximation.
        errors: Module → ‖ΔW - ΔW'‖_F/‖ΔW‖_F, in [0, 1]; 0 for a zero delta.
        error: The same for the whole adapter, √(Σ‖ΔW - ΔW'‖_F²)/√(Σ‖ΔW‖_F²).

    Example:
        >>> import torch, devec
        >>> delta = devec.Delta(torch.eye(4, 2), torch.diag(torch.tensor([3.0, 4.0])))
        >>> result = devec.compress(devec.Adapter("one", {"q_proj": delta}), rank=1)
        >>> round(result.error, 4), {m: round(e, 4) for m, e in result.errors.items()}
        (0.6, {'q_proj': 0.6})
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float


def compress(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> Compression:
    """Best approximation of an adapter by one of lower rank, module by module.

    With ΔW = U·diag(S)·Vh the approximation keeps the leading triplets; its relative error is
    √(Σ of the discarded S²)/‖ΔW‖_F.

    Args:
        adapter: The adapter; its carried tensors and bias changes are kept unchanged.
        rank: Largest rank of a module, at least 1. Modules of lower numerical rank keep that rank:
            singular values below 1e-6 of the largest (1e-12 for float64) count as rounding.
        energy: Fraction of the squared Frobenius norm of ΔW to keep in every module, in (0, 1], by
            the smallest rank that does so. Give exactly one of `rank` and `energy`.

    Returns:
        The compressed adapter and its relative errors. The error is the smallest of any adapter of
        these ranks; for a DoRA, whose gains are kept, the smallest of any with these gains. Modules
        of rank 0 are left out.

    Raises:
        IncompatibleError: If the arguments are out of range.

    Cost: O((out + in)·r²) for each module; O(out·in·r) for a DoRA, whose base weight is read.

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".

    Example:
        >>> import torch, devec
        >>> delta = devec.Delta(torch.eye(4, 2), torch.diag(torch.tensor([3.0, 4.0])))
        >>> adapter = devec.Adapter("one", {"q_proj": delta})
        >>> devec.compress(adapter, energy=0.6).adapter.modules["q_proj"].rank  # 16/25 is enough
        1
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
    """Truncate every module to the rank that `choose` gives for its name, S and ‖ΔW‖_F."""
    truncated: dict[str, TruncatedDelta] = {}
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            truncated[module] = truncate_delta(delta, lambda S, norm: choose(module, S, norm))  # noqa: B023
    return compression_of(adapter, truncated)


class TruncatedDelta(NamedTuple):
    """A delta of lower rank and its error.

    Attributes:
        delta: The truncated delta ΔW'; None if it is zero.
        lost: ‖ΔW - ΔW'‖_F.
        norm: ‖ΔW‖_F.
    """

    delta: Delta | None
    lost: float
    norm: float


def compression_of(adapter: Adapter, truncated: Mapping[str, TruncatedDelta]) -> Compression:
    """The compression of an adapter from its truncated modules."""
    lost, norms = ([getattr(t, name) for t in truncated.values()] for name in ("lost", "norm"))
    modules = {m: t.delta for m, t in truncated.items() if t.delta is not None}
    return Compression(
        adapter=dataclasses.replace(adapter, modules=modules, source="", sha256=""),
        errors={m: t.lost / t.norm if t.norm else 0.0 for m, t in truncated.items()},
        error=math.hypot(*lost) / (math.hypot(*norms) or 1.0),
    )


@full_precision
def truncate_delta(original: Delta, choose: Callable[[Tensor, float], int]) -> TruncatedDelta:
    """Truncate a delta to the rank that `choose` gives for its singular values and ‖ΔW‖_F."""
    # The factors become balanced, (U·√S, √S·Vh), with scaling 1; the gains of a DoRA are kept.
    delta = resolve_together({"": original})[""]
    svd = factored_svd(delta.folded().B, delta.A)
    S = svd.S
    norm = delta.weight_norm(float(S.norm()))
    rank = min(choose(S, norm), numerical_rank(S, RANK_RTOL[delta.dtype]))
    lost = float(S[rank:].norm())
    bias = None if delta.bias is None else delta.folded().bias
    if not (rank or bias is not None or isinstance(delta.gain, Gain)):
        return TruncatedDelta(None, lost, norm)
    B, A = (factor.to(delta.dtype) for factor in svd.leading(rank))
    gain = None
    if isinstance(delta.gain, Gain) and original.gain is not None:
        gain = dataclasses.replace(delta.gain.with_factors(B, A), base=original.gain.base)
    return TruncatedDelta(Delta(B, A, bias=bias, gain=gain), lost, norm)
