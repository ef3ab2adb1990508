"""Scaling by powers of two, for products that leave the range of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from devec.linalg.dtypes import basis_dtype

# Products of numbers between 2^-60 and 2^60 stay in the range of float32.
_LARGEST = 60
_LIMIT = 1000  # exponents up to this are representable in float64


def extreme_exponent(value: float) -> int:
    """The exponent e with |value|/2^e in [1/2, 1) if |e| > 60; otherwise 0, for no scaling."""
    exponent = math.frexp(value)[1]
    return exponent if abs(exponent) > _LARGEST else 0


def times_powers(tensors: Tensor, exponents: Sequence[int]) -> Tensor:
    """Entries of a stack of shape (batch, …) times 2^e each; exact if the results are normal."""
    if not any(exponents):
        return tensors
    scaled = tensors.to(basis_dtype(tensors.device))
    powers = [2.0 ** max(-_LIMIT, min(_LIMIT, exponent)) for exponent in exponents]
    factors = scaled.new_tensor(powers).reshape(-1, *(1 for _ in tensors.shape[1:]))
    return (scaled * factors).to(tensors)
