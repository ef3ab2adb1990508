"""Exact linear combination of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import linear_combination, on_common_modules
from devec.adapters.pool import warn_if_unrelated
from devec.arguments import listed_numbers
from devec.errors import IncompatibleError


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
        IncompatibleError: If the adapters do not fit together, the numbers of adapters and weights
            differ, or a weight is no finite number.

    Cost: memory O(Σ r_i·(out + in)) per module, no arithmetic beyond scaling B.
    """
    weights = listed_numbers(weights, "weights")
    if not adapters or len(adapters) != len(weights):
        raise IncompatibleError(
            f"combine needs one weight for each adapter; adapters: {len(adapters)}, weights: "
            f"{len(weights)}"
        )
    adapters = on_common_modules(adapters)
    if len(adapters) > 1:
        warn_if_unrelated(adapters)
    return dataclasses.replace(linear_combination(adapters, weights, carried_from), name=name)
