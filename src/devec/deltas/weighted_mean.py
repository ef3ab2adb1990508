"""Means of shared parts weighted by their norms, whatever the size of the norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from devec.deltas.delta import Delta
from devec.linalg.exponents import extreme_exponent, times_powers

# Norms of matrices whose entries float32 represents with all of their digits.
_SMALLEST, _LARGEST = -90, 120


class WeightedMean:
    """The common vectors of a stack, Σ ‖shared_i‖·shared_i / Σ ‖shared_i‖ (Eq. 14).

    Sums are held as coordinates Zᵀ·shared_i, with a power of two apart for the weights and one for
    the coordinates, so that no product leaves the range of float32. Powers of two are exact: where
    nothing would leave the range, no bit differs from the plain sum.

    Args:
        size: How many modules the stack has.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing."""
        self._norms: list[list[float]] = [[] for _ in range(size)]
        self._of_weights: list[int | None] = [None] * size
        self._of_values: list[int | None] = [None] * size
        self._sum: Tensor | None = None
        self._biases: list[Tensor | None] = [None] * size

    def add(
        self,
        coordinates: Tensor,
        exponents: Sequence[int],
        norms: Sequence[float],
        shared: Sequence[Delta | None],
    ) -> None:
        """Add the shared parts of an adapter.

        Args:
            coordinates: Zᵀ·shared·2^-e of each module, shape (batch, k, in).
            exponents: e of each module.
            norms: ‖shared‖_F of each module.
            shared: The parts, for the changes of their biases.
        """
        weights: list[float] = []
        shifts: list[int] = []
        for index, (norm, exponent) in enumerate(zip(norms, exponents, strict=True)):
            of_weights, of_values = self._raised(index, norm, exponent)
            weights.append(math.ldexp(norm, -of_weights))
            shifts.append(exponent - of_values)
            self._norms[index].append(norm)
        factors = coordinates.new_tensor(weights)[:, None, None]
        weighted = factors * times_powers(coordinates, shifts)
        self._sum = weighted if self._sum is None else self._sum.add_(weighted)
        for index, (part, weight) in enumerate(zip(shared, weights, strict=True)):
            if part is not None and part.bias is not None:
                bias = part.bias.double() if extreme_exponent(part.scaling) else part.bias
                term, total = weight * part.scaling * bias, self._biases[index]
                self._biases[index] = term if total is None else total + term

    def _raised(self, index: int, norm: float, exponent: int) -> tuple[int, int]:
        """The exponents of a module's sums, raised to those of one more term."""
        of_weights, of_values = self._of_weights[index], self._of_values[index]
        if not norm:  # adds nothing, and says nothing of the size of others
            return of_weights or 0, of_values or 0
        own = extreme_exponent(norm)
        weight = own if of_weights is None else max(own, of_weights)
        value = exponent if of_values is None else max(exponent, of_values)
        if of_weights is not None and of_values is not None and self._sum is not None:
            by_weight, by_value = of_weights - weight, of_values - value
            if by_weight or by_value:
                self._sum[index] = times_powers(self._sum[index][None], [by_weight + by_value])[0]
            if by_weight and (bias := self._biases[index]) is not None:
                self._biases[index] = times_powers(bias[None], [by_weight])[0]
        self._of_weights[index], self._of_values[index] = weight, value
        return weight, value

    def of(self, index: int, Z: Tensor) -> Delta | None:
        """The mean of a module, of rank ρ_shared.

        Args:
            index: The module.
            Z: Orthonormal basis of what is shared, shape (out, ρ_shared).

        Returns:
            The delta, its B the basis and its scaling 1 unless it leaves the range of the
            precision; None if nothing was added.
        """
        if self._sum is None:
            return None
        total = math.ldexp(math.fsum(self._norms[index]), -(self._of_weights[index] or 0)) or 1.0
        A, exponent = self._sum[index, : Z.shape[1]] / total, self._of_values[index] or 0
        bias = self._biases[index]
        bias = None if bias is None else bias / total
        if _SMALLEST < exponent < _LARGEST:
            return Delta(Z, times_powers(A[None], [exponent])[0], bias=bias)
        half = exponent // 2  # one half in A and one in the scaling, which goes to B in files
        scaling = math.ldexp(1.0, exponent - half)
        bias = None if bias is None else bias / scaling
        return Delta(Z, times_powers(A[None], [half])[0], scaling, bias)
