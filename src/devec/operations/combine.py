"""Exact linear combination of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import linear_combination, on_common_modules
from devec.adapters.pool import warn_if_unrelated
from devec.arguments import numbers
from devec.errors import IncompatibleError


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    name: str = "combined",
    carried_from: str | None = None,
) -> Adapter:
    """Linear combination Σ w_i · adapter_i as one adapter.

        ΔW = Σ w_i · ΔW_i

    Factors are concatenated, so ranks add; `devec.compress` reduces them with a known error. The
    combination of a single adapter scales its B factors and keeps rank and configuration.

    Args:
        adapters: One or more adapters of one base model.
        weights: One finite number for each adapter; negative weights subtract.
        name: Name of the result.
        carried_from: Name of the adapter whose whole trained tensors (``modules_to_save``, trained
            biases) the result keeps, or ``"none"``. By default they are kept if that is exact (one
            adapter has them, at weight 1) and refused otherwise.

    Returns:
        The combination, exact to rounding of the working precision. It is stored like the first
        adapter: in its format and, unless saving says otherwise, in its dtypes.

    Raises:
        IncompatibleError: If the adapters do not fit together, the numbers of adapters and weights
            differ, or a weight is not a finite number.

    Cost: memory O(Σ r_i·(out + in)) per module; no arithmetic but the scaling of B.

    Example:
        >>> import torch, devec
        >>> one = devec.Adapter("one", {"q_proj": devec.Delta(torch.ones(3, 1), torch.ones(1, 2))})
        >>> devec.combine([one, one], [1.0, -0.4]).modules["q_proj"]
        Delta(3×2, rank 2)
    """
    weights = numbers(weights, "weights")
    if not adapters or len(adapters) != len(weights):
        raise IncompatibleError(
            f"combine needs one weight for each adapter; adapters: {len(adapters)}, weights: "
            f"{len(weights)}"
        )
    adapters = on_common_modules(adapters)
    if len(adapters) > 1:
        warn_if_unrelated(adapters)
    return dataclasses.replace(linear_combination(adapters, weights, carried_from), name=name)
