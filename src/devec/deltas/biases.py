"""Sums and inner products of changes of a bias, of which None stands for zero."""

from __future__ import annotations

from torch import Tensor

from devec.linalg.dtypes import basis_dtype
from devec.linalg.precision import full_precision


@full_precision
def bias_inner(left: Tensor | None, right: Tensor | None) -> float:
    """⟨b1, b2⟩, computed in the basis precision."""
    if left is None or right is None:
        return 0.0
    dtype = basis_dtype(left.device)
    return float(left.to(dtype) @ right.to(dtype))


def sum_of_biases(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of two bias changes."""
    if left is None or right is None:
        return left if right is None else right
    return left + right
