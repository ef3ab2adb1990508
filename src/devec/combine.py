"""Exact linear combination of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from numbers import Real

from devec.adapter import Adapter
from devec.algebra import linear_combination, on_common_modules
from devec.errors import IncompatibleError
from devec.pool import warn_of_strangers


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    name: str = "combined",
    carried_from: str | None = None,
) -> Adapter:
    """Σ w_i · adapter_i as one adapter, exact: what loading all of them with these weights gives.

    The factors are concatenated, so ranks add; `devec.compress` brings them down with a known
    error. With one adapter only its B factors are scaled, and rank and config stay.

    Args:
        adapters: One or more adapters of one base model.
        weights: A finite weight for each; negative weights subtract.
        name: What to call the result.
        carried_from: Name of the adapter whose whole trained tensors (``modules_to_save``, trained
            biases) the result keeps, or ``"none"``. Without it they are kept where that is exact
            (one adapter has them, at weight 1) and refused otherwise.

    Returns:
        The combination, exact to rounding of the working precision, stored like the first adapter:
        in its format and, unless another is asked for when saving, in its storage types.

    Raises:
        IncompatibleError: If the adapters do not fit together, or the numbers of adapters and
            weights differ.

    Cost: memory O(Σ r_i·(out + in)) per module, no arithmetic beyond scaling B.
    """
    require_numbers(weights)
    if not adapters or len(adapters) != len(weights):
        raise IncompatibleError(
            f"combine needs one weight for each adapter; adapters: {len(adapters)}, weights: "
            f"{len(weights)}"
        )
    adapters = on_common_modules(adapters)
    if len(adapters) > 1:
        warn_of_strangers(adapters)
    return dataclasses.replace(linear_combination(adapters, weights, carried_from), name=name)


def require_numbers(weights: object) -> None:
    """Check that weights are numbers.

    Args:
        weights: What was given for them.

    Raises:
        IncompatibleError: If it is no list of numbers.
    """
    if isinstance(weights, str) or not isinstance(weights, Collection):
        raise IncompatibleError(f"weights are a list of numbers, got {weights!r}")
    odd = [weight for weight in weights if not isinstance(weight, Real)]
    if odd:
        raise IncompatibleError(f"weights are numbers, got {odd[0]!r}")
