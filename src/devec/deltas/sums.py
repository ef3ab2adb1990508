"""Several deltas of one module at once, so that its base weight is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from devec.deltas.base_weight import BaseWeight, InMemoryWeight
from devec.deltas.delta import Delta
from devec.deltas.gains import require_same_base
from devec.linalg.dtypes import working_dtype
from devec.linalg.precision import full_precision


@full_precision
def resolve_together(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Deltas of one module that can be computed with, their base weight read once and held.

    Args:
        deltas: Name → delta; those of LoRAs are as they were.

    Returns:
        Name → resolved delta.

    Raises:
        DevecError: If the base weight cannot be read or is not the same for all.
    """
    gains = [delta.gain for delta in deltas.values() if delta.gain is not None]
    if not gains:
        return dict(deltas)
    for gain in gains:
        require_same_base(gains[0], gain)
    factors = [factor for delta in deltas.values() for factor in (delta.B, delta.A)]
    W = gains[0].base.read(working_dtype(*factors), factors[0].device)
    held = InMemoryWeight(W, gains[0].base.source)
    return {name: delta.on(held).resolved() for name, delta in deltas.items()}


def first_base_weight(deltas: Iterable[Delta]) -> BaseWeight | None:
    """The base weight of the first delta that has one."""
    return next((delta.gain.base for delta in deltas if delta.gain is not None), None)


@full_precision
def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w_i · ΔW_i of deltas of one module; a delta alone at weight 1 is itself.

    Args:
        deltas: The deltas, one at least.
        weights: One for each.

    Returns:
        The sum, exact to rounding. A base weight that it needs is read once.

    Raises:
        DevecError: If the deltas do not fit together, or the base weight cannot be read.
    """
    if len(deltas) == 1 and weights[0] == 1:
        return deltas[0]
    held = resolve_together({str(i): delta for i, delta in enumerate(deltas)}).values()
    first, *others = (
        delta if weight == 1 else weight * delta
        for delta, weight in zip(held, weights, strict=True)
    )
    total = sum(others, first)
    base = first_base_weight(deltas)
    return total if base is None else total.on(base)
