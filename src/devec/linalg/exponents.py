"""Powers of two kept apart from tensors, for products that leave the range of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from devec.linalg.dtypes import basis_dtype

# Numbers up to 2^60 and down to 2^-60 have products that float32 represents.
_LARGEST = 60
_LIMIT = 1000  # of exponents that a float of Python represents


def extreme_exponent(value: float) -> int:
    """The e with |value|/2^e in [1/2, 1) if |e| is above 60; else 0, for no scaling is needed."""
    exponent = math.frexp(value)[1]
    return exponent if abs(exponent) > _LARGEST else 0


def times_powers(tensors: Tensor, exponents: Sequence[int]) -> Tensor:
    """Tensors of a stack times 2^e each, exact as long as the results are normal numbers.

    Args:
        tensors: Shape (batch, …).
        exponents: One for each tensor.

    Returns:
        The products, in the type of the tensors; the tensors themselves if all exponents are 0.
    """
    if not any(exponents):
        return tensors
    scaled = tensors.to(basis_dtype(tensors.device))
    powers = [2.0 ** max(-_LIMIT, min(_LIMIT, exponent)) for exponent in exponents]
    factors = scaled.new_tensor(powers).reshape(-1, *(1 for _ in tensors.shape[1:]))
    return (scaled * factors).to(tensors)
