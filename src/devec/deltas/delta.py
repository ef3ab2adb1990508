"""What an adapter does to one module: an element of an exact vector space, kept in factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from devec.arguments import inverse, number
from devec.deltas.base_weight import BaseWeight
from devec.deltas.gains import (
    AXES,
    Axis,
    AxisGain,
    Gain,
    Magnitude,
    base_overlap,
    gain_from_magnitude,
    inner_across,
    is_same_gain,
    is_same_tensor,
    nonzero_gain,
    oriented,
    require_same_base,
    row_dots,
)
from devec.deltas.matrix import DeltaMatrix
from devec.errors import IncompatibleError
from devec.linalg.dtypes import CANCELLATION, basis_dtype, working_dtype
from devec.linalg.factors import ColumnSpace, column_space, norm, product_inner, product_norm
from devec.linalg.precision import full_precision


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Delta:
    """The change an adapter makes to one module, ΔW and Δb = scaling · b.

        ΔW = scaling · B · A  +  diag(g) · W0  +  W0 · diag(h)

    W is the weight as a linear map from inputs to outputs, shape (out, in): a convolution is
    flattened to (out, in·kh·kw), a layer that stores its weight transposed is taken untransposed.
    A LoRA has g = h = 0. A DoRA with magnitudes of its outputs has g, with magnitudes of its inputs
    h. Deltas of one module are a vector space under ``+`` and ``*``: sums concatenate factors and
    add gains, so all of it is exact, and ΔW itself is never formed.

    Attributes:
        B: Output-side factor, shape (out, rank), as stored or in the working precision.
        A: Input-side factor, shape (rank, in).
        scaling: The effective scaling (alpha/r, or alpha/√r for rank-stabilised LoRA).
        bias: Change of the bias before scaling, shape (out,), or None.
        gain: What a DoRA does to the base weight: as magnitudes where they stand for it together
            with B, A and scaling as stored, or as the gains g and h. None for a LoRA.

    Raises:
        IncompatibleError: If the shapes do not fit together.
    """

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    scaling: float = 1.0
    bias: Float[Tensor, " out"] | None = None
    gain: Gain | Magnitude | None = None

    def __post_init__(self) -> None:
        if type(self.scaling) is not float or not math.isfinite(self.scaling):
            object.__setattr__(self, "scaling", float(number(self.scaling, "scaling")))
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise IncompatibleError(
                f"factors disagree: B {tuple(self.B.shape)} should be (out, rank) and "
                f"A {tuple(self.A.shape)} should be (rank, in) with one rank"
            )
        if self.bias is not None and self.bias.shape != self.B.shape[:1]:
            raise IncompatibleError(
                f"bias has shape {tuple(self.bias.shape)}, expected ({self.B.shape[0]},)"
            )

    def __repr__(self) -> str:
        biased = ", with bias" if self.bias is not None else ""
        gained = ", with gains" if self.gain is not None else ""
        return f"Delta({self.shape[0]}×{self.shape[1]}, rank {self.rank}{gained}{biased})"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the rank of the low-rank part."""
        return self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The precision this delta is combined in."""
        return working_dtype(self.B, self.A)

    def to(self, device: torch.device | str) -> Delta:
        """The same delta on another device."""
        return self.each(lambda tensor: tensor.to(device))

    @property
    def outline(self) -> Delta:
        """What is known of the delta without its values: shapes and types, on no device."""
        return self if self.B.is_meta else self.to("meta")

    def each(self, change: Callable[[Tensor], Tensor]) -> Delta:
        """The same delta with another tensor for every one, in an order that is always the same."""
        bias = None if self.bias is None else change(self.bias)
        gain = None if self.gain is None else self.gain.each(change)
        return dataclasses.replace(self, B=change(self.B), A=change(self.A), bias=bias, gain=gain)

    def same_as(self, other: Delta) -> bool:
        """Whether all tensors are those of another delta, so that nothing need be computed."""
        return (
            self.scaling == other.scaling
            and is_same_tensor(self.B, other.B)
            and is_same_tensor(self.A, other.A)
            and is_same_tensor(self.bias, other.bias)
            and is_same_gain(self.gain, other.gain)
        )

    def on(self, base: BaseWeight) -> Delta:
        """The same delta with its base weight read from elsewhere; a LoRA needs none."""
        if self.gain is None:
            return self
        return dataclasses.replace(self, gain=dataclasses.replace(self.gain, base=base))

    def folded(self) -> Delta:
        """The same delta with the scaling multiplied into B and the bias."""
        dtype, s = self.dtype, self.scaling
        if s == 1 and self.B.dtype == dtype and (self.bias is None or self.bias.dtype == dtype):
            return self
        if self.B.is_meta:  # an outline has no values that could be multiplied
            return dataclasses.replace(self, B=self.B.to(dtype), scaling=1.0)
        bias = None if self.bias is None else s * self.bias.to(dtype)
        gain = self.gain.scaled(1.0, s) if isinstance(self.gain, Gain) else self.gain
        return Delta(B=s * self.B.to(dtype), A=self.A, bias=bias, gain=gain)

    @full_precision
    def resolved(self) -> Delta:
        """The same delta with gains for magnitudes, so that it can be computed with.

        On the output axis W' = D·(W0 + s·B·A) with D = diag(m/‖W0 + s·B·A‖_row), so that g = D - 1
        and the low-rank part is D·s·B·A. On the input axis the same, transposed.

        Returns:
            The delta, exact to rounding; a LoRA as it is.

        Raises:
            DevecError: If the base weight cannot be read or is not the one trained on.

        Cost: O(out·in·r), one pass over the base weight.

        Reference: Liu et al. 2024, arXiv 2402.09353, Eq. 5.
        """
        if not isinstance(self.gain, Magnitude):
            return self
        m, delta = self.gain, self.folded()
        factors = delta.B.to(self.dtype), delta.A.to(self.dtype)
        D, gain = gain_from_magnitude(m.values, *oriented(*factors, m.base, m.axis))
        D = D.to(self.dtype)
        B, A = (D[:, None] * delta.B, delta.A) if m.axis == "out" else (delta.B, delta.A * D)
        return Delta(B, A, bias=delta.bias, gain=Gain(m.base, {m.axis: gain}))

    @property
    def low_rank(self) -> Delta:
        """The part of the delta that is a product of factors: all of a LoRA."""
        return dataclasses.replace(self.resolved(), gain=None)

    @full_precision
    def __mul__(self, weight: float) -> Delta:
        delta, weight = self.resolved(), float(number(weight, "weight"))
        bias = None if delta.bias is None else weight * delta.bias.to(delta.dtype)
        gain = delta.gain.scaled(weight, weight) if isinstance(delta.gain, Gain) else None
        return dataclasses.replace(delta, B=weight * delta.B.to(delta.dtype), bias=bias, gain=gain)

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Delta:
        return self * inverse(weight, "weight")

    def __neg__(self) -> Delta:
        return self * -1.0

    @full_precision
    def __add__(self, other: Delta) -> Delta:
        self._require_same_shape(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        left, right = self.resolved().folded(), other.resolved().folded()
        return Delta(
            B=torch.cat([left.B.to(dtype), right.B.to(dtype)], dim=1),
            A=torch.cat([left.A.to(dtype), right.A.to(dtype)], dim=0),
            bias=_sum(left.bias, right.bias),
            gain=_sum_of_gains(left, right),
        )

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    @full_precision
    def inner(self, other: Delta) -> float:
        """⟨ΔW1, ΔW2⟩_F + ⟨Δb1, Δb2⟩.

        Args:
            other: A delta of the same module.

        Returns:
            The inner product, exact to rounding; O((out + in)·r1·r2) and, for a DoRA whose gains
            meet another adapter's factors, O(out·in·r).

        Raises:
            IncompatibleError: If the weights have different shapes or base models.
        """
        self._require_same_shape(other)
        left, right = self.resolved(), other.resolved()
        low = product_inner(left.B, left.A, right.B, right.A)
        total = left.scaling * (right.scaling * low + _bias_inner(left, right))
        return total + _gain_inner(left, right)

    @full_precision
    def norm(self) -> float:
        """Frobenius norm of (ΔW, Δb), accurate also where terms cancel; O((out + in)·r²)."""
        delta = self.resolved()
        return math.hypot(delta.weight_norm(), delta.bias_norm())

    @full_precision
    def weight_norm(self, low_rank: float | None = None) -> float:
        """Frobenius norm of ΔW, of a resolved delta.

        Args:
            low_rank: ‖s·B·A‖_F, where it is known already.

        Returns:
            The norm, from factors and overlaps; where the terms of a DoRA cancel, from blocks of
            its rows, for which the base weight is read.
        """
        if low_rank is None:
            low_rank = abs(self.scaling) * product_norm(self.B, self.A)
        if not isinstance(self.gain, Gain):
            return low_rank
        gained = (float(g.values.square() @ g.squares) for g in self.gain.axes.values())
        squared = low_rank**2 + _gain_inner(self, self)
        if squared > CANCELLATION * (low_rank**2 + sum(gained)):
            return math.sqrt(squared)
        change = self.folded().change()
        return 0.0 if change is None else change.norm()

    def change(self) -> DeltaMatrix | None:
        """ΔW of a resolved and folded DoRA as an operator, its base weight read; None of a LoRA."""
        if not isinstance(self.gain, Gain):
            return None
        W = self.gain.base.read(self.dtype, self.B.device)
        axes = self.gain.axes
        g, h = (axes[axis].values.to(W) if axis in axes else None for axis in AXES)
        return DeltaMatrix(self.B.to(W), self.A.to(W), W, g, h)

    def bias_norm(self) -> float:
        """Euclidean norm of Δb."""
        return 0.0 if self.bias is None else abs(self.scaling) * norm(self.bias)

    @full_precision
    def factor_norm(self) -> float:
        """|s|·‖B‖_F·‖A‖_F + ‖diag(g)·W0‖, to which rounding in sums is relative."""
        delta = self.resolved()
        low_rank = abs(delta.scaling) * norm(delta.B) * norm(delta.A)
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        return low_rank + sum(math.sqrt(g.values.square() @ g.squares) for g in axes.values())

    @full_precision
    def column_space(self) -> ColumnSpace:
        """Column space of the low-rank part of a resolved delta; of dimension 0 at scaling 0."""
        return column_space(self.B if self.scaling else 0 * self.B, self.A)

    @full_precision
    def projected(self, Z: Float[Tensor, "out k"]) -> Delta:
        """The part of this delta in the span of Z: ``Z·Zᵀ·ΔW`` (Eq. 12), bias alike.

        Of a LoRA only B and the bias change, so rank, scaling and A stay what they are. Of a DoRA
        the part is a LoRA with the factors Z and Zᵀ·ΔW, of rank k.

        Args:
            Z: Orthonormal columns, shape (out, k).

        Returns:
            The projection, B in the working precision; O(out·k·r), of a DoRA O(out·in·k).
        """
        delta = self.resolved()
        Z = Z.to(delta.dtype)
        bias = None if delta.bias is None else Z @ (Z.mT @ delta.bias.to(delta.dtype))
        if not isinstance(delta.gain, Gain):
            B = Z @ (Z.mT @ delta.B.to(delta.dtype))
            return dataclasses.replace(delta, B=B, bias=bias)
        bias = None if bias is None else delta.scaling * bias
        return Delta(Z, delta.coordinates(Z), bias=bias)

    @full_precision
    def coordinates(self, Z: Float[Tensor, "out k"]) -> Float[Tensor, "k in"]:
        """``Zᵀ·ΔW``: one thin product with each term of the delta.

        Args:
            Z: Columns, shape (out, k).

        Returns:
            The product in the working precision; O((out + in)·k·r), of a DoRA O(out·in·k).
        """
        delta = self.resolved()
        Z = Z.to(delta.dtype)
        C = (delta.scaling * (Z.mT @ delta.B.to(delta.dtype))) @ delta.A.to(delta.dtype)
        if isinstance(delta.gain, Gain):
            W = delta.gain.base.read(delta.dtype, Z.device)
            if "out" in delta.gain.axes:
                C.addmm_((delta.gain.axes["out"].values.to(Z)[:, None] * Z).mT, W)
            if "in" in delta.gain.axes:
                C += (Z.mT @ W) * delta.gain.axes["in"].values.to(Z)
        return C

    def without(self, part: Delta) -> Delta:
        """``ΔW - part`` for a projection of this delta.

        Args:
            part: The projection.

        Returns:
            The rest. Of a LoRA, whose part has the same A and scaling, B is subtracted, and the
            rank is kept; of a DoRA ranks add.
        """
        if self.gain is not None:
            return self - part
        bias = _sum(self.bias, None if part.bias is None else -part.bias)
        return dataclasses.replace(self, B=self.B.to(part.dtype) - part.B, bias=bias)

    def _require_same_shape(self, other: Delta) -> None:
        if self.shape != other.shape:
            raise IncompatibleError(f"weights of shapes {self.shape} and {other.shape}")


def _sum_of_gains(left: Delta, right: Delta) -> Gain | None:
    """The gains of a sum of resolved deltas, their overlaps side by side as the factors are."""
    known = [d.gain for d in (left, right) if isinstance(d.gain, Gain)]
    if not known:
        return None
    require_same_base(known[0], known[-1])
    base = known[0].base
    axes: dict[Axis, AxisGain] = {}
    for axis in AXES:
        gains = [gain.axes[axis] for gain in known if axis in gain.axes]
        if gains:
            overlap = torch.cat([_overlap(delta, axis, base) for delta in (left, right)], dim=1)
            values = gains[0].values if len(gains) == 1 else gains[0].values + gains[1].values
            axes[axis] = AxisGain(values, overlap, gains[0].squares)
    return nonzero_gain(base, axes)


def _overlap(delta: Delta, axis: Axis, base: BaseWeight) -> Tensor:
    """W0·Aᵀ of a resolved delta, or on the input axis W0ᵀ·B; as it is known, or from W0."""
    if isinstance(delta.gain, Gain) and axis in delta.gain.axes:
        return delta.gain.axes[axis].overlap
    _, A, weight = oriented(delta.B, delta.A, base, axis)
    return base_overlap(A.to(delta.dtype), weight)


def _gain_inner(left: Delta, right: Delta) -> float:
    """What gains add to the inner product of two resolved deltas."""
    known = [d.gain for d in (left, right) if isinstance(d.gain, Gain)]
    if not known:
        return 0.0
    require_same_base(known[0], known[-1])
    base, total = known[0].base, 0.0
    gains = [d.gain.axes if isinstance(d.gain, Gain) else {} for d in (left, right)]
    for axis in AXES:
        for other, held in ((right, gains[0]), (left, gains[1])):
            if axis in held:
                B, _, _ = oriented(other.B, other.A, base, axis)
                dots = row_dots(B, _overlap(other, axis, base))
                total += other.scaling * float(held[axis].values @ dots)
        if axis in gains[0] and axis in gains[1]:
            first, second = gains[0][axis], gains[1][axis]
            total += float((first.values * second.values) @ first.squares)
    for rows, columns in (gains, gains[::-1]):
        if "out" in rows and "in" in columns:
            total += inner_across(rows["out"], columns["in"], base)
    return total


def _bias_inner(left: Delta, right: Delta) -> float:
    """⟨b1, b2⟩ times the scaling of the second."""
    if left.bias is None or right.bias is None:
        return 0.0
    dtype = basis_dtype(left.B.device)
    return right.scaling * float(left.bias.to(dtype) @ right.bias.to(dtype))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of two bias changes, None standing for zero."""
    if left is None or right is None:
        return left if right is None else right
    return left + right
