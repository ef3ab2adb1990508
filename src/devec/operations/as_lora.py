"""The nearest plain LoRA to an adapter that is none."""

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
    """The best approximation of an adapter by a plain LoRA, module by module.

    The change that a DoRA makes has full rank, since it scales the base weight. Its leading
    singular vectors are found by a randomised range finder on products with W0; the change itself
    is formed by at most 128 rows at a time, and only to measure the error.

    Args:
        adapter: The adapter, its DoRAs read with a base model. Bias changes are kept.
        rank: Rank of every module that is a DoRA, at least 1. Plain LoRAs stay as they are.

    Returns:
        The plain LoRA and its relative errors ‖ΔW - ΔW'‖_F/‖ΔW‖_F, measured, for every module and
        in total: the least there is, nearly (within 1 % of it on all that was tried).

    Raises:
        IncompatibleError: If the rank is below 1, or a base weight is needed and was not given.

    Cost: O(out·in·rank) a module, about eleven products with the base weight of which each
    costs that much.

    Reference: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, Algorithms 4.4 and 5.1.
    """
    rank = whole_number(rank, "rank")
    if rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank} (--as-lora, as_lora)")
    cuts: dict[str, TruncatedDelta] = {}
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            cuts[module] = _nearest_lora(delta, rank)
    result = compression_of(adapter, cuts)
    record = provenance("as_lora", [adapter], rank=rank, relative_error=result.error)
    written = dataclasses.replace(result.adapter, provenance=record)
    return dataclasses.replace(result, adapter=written)


def _nearest_lora(original: Delta, rank: int) -> TruncatedDelta:
    """The nearest delta of a rank, without gains."""
    delta = resolve_together({"": original})[""].folded()
    change, norm = delta.change(), delta.weight_norm()
    if change is None:
        return TruncatedDelta(original, 0.0, norm)
    V = leading_row_space(change, rank, change.W)
    Q = orthonormal_basis(change @ V)
    U, S, Vh = product_svd(Q, change.adjoint(Q).mT)
    rank = min(rank, numerical_rank(S, RANK_RTOL[delta.dtype]))
    root = S[:rank].sqrt()
    B, A = (U[:, :rank] * root).to(delta.dtype), (root[:, None] * Vh[:rank]).to(delta.dtype)
    nearest = Delta(B, A, bias=delta.bias) if rank or delta.bias is not None else None
    return TruncatedDelta(nearest, change.distance(B, A), norm)


def with_lora_record(part: Adapter, result: Compression, rank: int) -> Adapter:
    """A plain LoRA that is written for a DoRA, with a record of how near it is.

    Args:
        part: The DoRA, under the record of the operation that made it.
        result: The LoRA.
        rank: The rank that was asked for.

    Returns:
        The LoRA under that record.
    """
    doras = [m for m, delta in outlines(part.modules).items() if delta.gain is not None]
    said = {
        "rank": rank,
        "relative_error": result.error,
        "of_modules": {module: float(f"{result.errors[module]:.3g}") for module in doras},
    }
    record = {**(part.provenance or {}), "as_lora": said}
    return dataclasses.replace(result.adapter, provenance=record)
