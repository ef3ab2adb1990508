"""Operations on several deltas of one module, which read its base weight once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from devec.deltas.base_weight import BaseWeight, HeldWeight
from devec.deltas.delta import Delta
from devec.deltas.gains import require_same_base
from devec.linalg.dtypes import working_dtype
from devec.linalg.precision import full_precision


@full_precision
def resolve_together(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Resolved deltas of one module, by name, with their base weight read once into memory."""
    gains = [delta.gain for delta in deltas.values() if delta.gain is not None]
    if not gains:
        return dict(deltas)
    for gain in gains:
        require_same_base(gains[0], gain)
    factors = [factor for delta in deltas.values() for factor in (delta.B, delta.A)]
    W = gains[0].base.read(working_dtype(*factors), factors[0].device)
    weight = HeldWeight(W, gains[0].base.source)
    return {name: delta.on(weight).resolved() for name, delta in deltas.items()}


def first_base_weight(deltas: Iterable[Delta]) -> BaseWeight | None:
    """The base weight of the first DoRA; None if all are LoRAs."""
    return next((delta.gain.base for delta in deltas if delta.gain is not None), None)


@full_precision
def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w_i · ΔW_i of one or more deltas of one module; a single delta of weight 1 is returned."""
    if len(deltas) == 1 and weights[0] == 1:
        return deltas[0]
    resolved = resolve_together({str(i): delta for i, delta in enumerate(deltas)}).values()
    first, *others = (
        delta if weight == 1 else weight * delta
        for delta, weight in zip(resolved, weights, strict=True)
    )
    total = sum(others, first)
    base = first_base_weight(deltas)
    return total if base is None else total.on(base)
