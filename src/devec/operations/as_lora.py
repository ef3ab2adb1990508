"""The nearest plain LoRA to a DoRA, with the error."""

from __future__ import annotations

import dataclasses

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import provenance
from devec.arguments import whole_number
from devec.deltas.delta import Delta
from devec.deltas.sums import resolve_together
from devec.errors import IncompatibleError, located
from devec.lazy import outlines
from devec.linalg.dtypes import RANK_RTOL
from devec.linalg.factors import numerical_rank, product_svd
from devec.linalg.precision import full_precision
from devec.linalg.range_finder import leading_row_space, orthonormal_basis
from devec.operations.compress import Compression, TruncatedDelta, compression_of


@full_precision
def as_lora(adapter: Adapter, rank: int) -> Compression:
    """Best approximation of an adapter by a plain LoRA, module by module.

    A DoRA scales the base weight, so its ΔW has full rank. A randomised range finder on products
    with W0 gives a basis Q of the leading directions, and the LoRA is the truncated SVD of Q·QᵀΔW.
    At most 128 rows of ΔW are formed at a time, to measure the error.

    Args:
        adapter: The adapter; its DoRAs were read with a base model. Bias changes are kept.
        rank: Rank of every module that is a DoRA, at least 1. LoRA modules stay unchanged.

    Returns:
        The plain LoRA and its relative errors ‖ΔW - ΔW'‖_F/‖ΔW‖_F, measured for every module and in
        total. Approximate: within 1 % of the smallest error in all cases tried.

    Raises:
        IncompatibleError: If the rank is below 1, or a base weight is needed and missing.

    Cost: about eleven products with the base weight, O(out·in·rank) each, for each DoRA module.

    Reference: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, Algorithms 4.4 and 5.1.

    Example:
        >>> import torch, devec
        >>> from devec.deltas.base_weight import HeldWeight
        >>> from devec.deltas.gains import Magnitude
        >>> magnitude = Magnitude(torch.full((4,), 2.0), "out", HeldWeight(torch.eye(4)))
        >>> delta = devec.Delta(torch.zeros(4, 1), torch.zeros(1, 4), gain=magnitude)  # ΔW = I
        >>> result = devec.as_lora(devec.Adapter("one", {"q_proj": delta}), rank=3)
        >>> result.adapter.modules["q_proj"], round(result.error, 4)
        (Delta(4×4, rank 3), 0.5)
    """
    rank = whole_number(rank, "rank")
    if rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank} (--as-lora, as_lora)")
    nearest: dict[str, TruncatedDelta] = {}
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            nearest[module] = _nearest_lora(delta, rank)
    result = compression_of(adapter, nearest)
    record = provenance("as_lora", [adapter], rank=rank, relative_error=result.error)
    lora = dataclasses.replace(result.adapter, provenance=record)
    return dataclasses.replace(result, adapter=lora)


def _nearest_lora(original: Delta, rank: int) -> TruncatedDelta:
    """The nearest delta of a rank without gains; a LoRA is returned unchanged."""
    delta = resolve_together({"": original})[""].folded()
    matrix, norm = delta.change(), delta.weight_norm()
    if matrix is None:
        return TruncatedDelta(original, 0.0, norm)
    V = leading_row_space(matrix, rank, matrix.W)
    Q = orthonormal_basis(matrix @ V)
    U, S, Vh = product_svd(Q, matrix.adjoint(Q).mT)
    rank = min(rank, numerical_rank(S, RANK_RTOL[delta.dtype]))
    root = S[:rank].sqrt()
    B, A = (U[:, :rank] * root).to(delta.dtype), (root[:, None] * Vh[:rank]).to(delta.dtype)
    nearest = Delta(B, A, bias=delta.bias) if rank or delta.bias is not None else None
    return TruncatedDelta(nearest, matrix.distance(B, A), norm)


def with_lora_record(part: Adapter, result: Compression, rank: int) -> Adapter:
    """The LoRA that stands for a part with DoRAs, its record extended by rank and error."""
    doras = [m for m, delta in outlines(part.modules).items() if delta.gain is not None]
    approximation = {
        "rank": rank,
        "relative_error": result.error,
        "of_modules": {module: float(f"{result.errors[module]:.3g}") for module in doras},
    }
    record = {**(part.provenance or {}), "as_lora": approximation}
    return dataclasses.replace(result.adapter, provenance=record)
