"""What a DoRA does to the base weight: gains, and the magnitudes from which they follow.

Everything is written for rows of W0, the output axis. The input axis is its transpose, with Aᵀ, Bᵀ
and W0ᵀ in place of B, A and W0.

Reference: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, Eq. 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from devec.deltas.base_weight import BaseWeight, HeldWeight, transposed
from devec.errors import FormatError, IncompatibleError, warn
from devec.linalg.dtypes import BLOCK_ROWS, CANCELLATION, RANK_RTOL, basis_dtype, working_dtype
from devec.linalg.factors import has_nearly_dependent_rows
from devec.linalg.precision import full_precision

Axis = Literal["out", "in"]
AXES: tuple[Axis, Axis] = ("out", "in")

# Training keeps magnitudes near the norms. If the median ratio is beyond this factor, the base
# model is probably another one.
_FAR_RATIO = 4.0


@dataclass(frozen=True, eq=False)
class Magnitude:
    """The stored magnitudes of a DoRA: the norms to which W0 + s·B·A is rescaled.

    W' = diag(m/‖V‖_row)·V on the output axis and W' = V·diag(m/‖V‖_column) on the input axis, with
    V = W0 + s·B·A. On the input axis of a convolution one norm covers all columns of a channel.

    Attributes:
        values: m, one value for each output or input channel. Zero and negative values are valid.
        axis: ``"out"`` (PEFT, diffusers, LyCORIS from 3.2 on) or ``"in"`` (earlier LyCORIS,
            OneTrainer).
        base: Base weight W0.
    """

    values: Float[Tensor, " n"]
    axis: Axis
    base: BaseWeight

    def each(self, change: Callable[[Tensor], Tensor]) -> Magnitude:
        """The same with `change` applied to the tensor."""
        return dataclasses.replace(self, values=change(self.values))


@dataclass(frozen=True, eq=False)
class AxisGain:
    """The gains g of one axis, for diag(g)·W, with the products of W that norms need.

    Attributes:
        values: g, shape (out,).
        overlap: W·Aᵀ, shape (out, rank), so that norms and inner products do not read W again.
            float64 if float32 would lose digits, see `base_overlap`.
        squares: ‖w_i‖², shape (out,).
    """

    values: Float[Tensor, " out"]
    overlap: Float[Tensor, "out rank"]
    squares: Float[Tensor, " out"]

    def each(self, change: Callable[[Tensor], Tensor]) -> AxisGain:
        """The same with `change` applied to each tensor."""
        return AxisGain(*map(change, (self.values, self.overlap, self.squares)))


@dataclass(frozen=True, eq=False)
class Gain:
    """A change of the base weight by gains: diag(g)·W0 + W0·diag(h).

    Attributes:
        base: Base weight W0.
        axes: ``"out"`` → g, ``"in"`` → h; at least one of them.
    """

    base: BaseWeight
    axes: dict[Axis, AxisGain]

    def scaled(self, weight: float, factor: float) -> Gain | None:
        """The gains times `weight`, for factors whose B is multiplied by `factor`; None if zero."""
        axes: dict[Axis, AxisGain] = {}
        for axis, gain in self.axes.items():
            overlap = factor * gain.overlap if axis == "in" else gain.overlap  # W0ᵀ·B or W0·Aᵀ
            axes[axis] = AxisGain(weight * gain.values, overlap, gain.squares)
        return nonzero_gain(self.base, axes)

    @full_precision
    def with_factors(self, B: Tensor, A: Tensor) -> Gain:
        """The same gains with the overlaps of other factors; O(out·in·rank)."""
        axes: dict[Axis, AxisGain] = {}
        for axis, gain in self.axes.items():
            _, factor, weight = oriented(B, A, self.base, axis)
            axes[axis] = dataclasses.replace(zero_gain(factor, weight), values=gain.values)
        return Gain(self.base, axes)

    def each(self, change: Callable[[Tensor], Tensor]) -> Gain:
        """The same with `change` applied to each tensor."""
        return Gain(self.base, {axis: gain.each(change) for axis, gain in self.axes.items()})


def nonzero_gain(base: BaseWeight, axes: dict[Axis, AxisGain]) -> Gain | None:
    """Gains without the axes whose values are all zero; None if no axis remains."""
    kept = {a: gain for a, gain in axes.items() if gain.values.is_meta or bool(gain.values.any())}
    return Gain(base, kept) if kept else None


def oriented(
    B: Tensor, A: Tensor, base: BaseWeight, axis: Axis
) -> tuple[Tensor, Tensor, BaseWeight]:
    """Factors and base weight, transposed if necessary so that `axis` runs along the rows."""
    return (B, A, base) if axis == "out" else (A.mT, B.mT, transposed(base))


@full_precision
def base_overlap(A: Float[Tensor, "rank in"], base: BaseWeight) -> Float[Tensor, "out rank"]:
    """W·Aᵀ in the working precision, or in float64 if rows of A are nearly dependent."""
    # Then the products b·A of rows of B cancel most of their terms, and so do b·(W·Aᵀ)ᵀ. With
    # Aᵀ = Q·R the overlap is (W·Q)·R, whose rounding is that of orthonormal columns.
    dtype = working_dtype(A)
    W, A = base.read(dtype, A.device), A.to(dtype)
    if dtype == basis_dtype(A.device) or not has_nearly_dependent_rows(A):
        return W @ A.mT
    Q, R = torch.linalg.qr(A.mT.to(basis_dtype(A.device)))
    overlap: Tensor = (W @ Q.to(dtype)).to(R) @ R
    return overlap


@full_precision
def zero_gain(A: Float[Tensor, "rank in"], base: BaseWeight) -> AxisGain:
    """Gains of zero beside a factor A; `FormatError` if W is not finite. O(out·in·rank)."""
    dtype = working_dtype(A)
    if not isinstance(base, HeldWeight) or base.tensor.dtype != dtype:
        base = HeldWeight(base.read(dtype, A.device))
    squares = base.row_squares
    if not bool(torch.isfinite(squares).all()):
        rows = int((~torch.isfinite(squares)).sum())
        raise FormatError(f"the base weight holds NaN or infinity in {rows} of its rows")
    return AxisGain(torch.zeros_like(squares), base_overlap(A, base), squares)


@full_precision
def gain_from_magnitude(
    magnitude: Float[Tensor, " n"],
    B: Float[Tensor, "out rank"],
    A: Float[Tensor, "rank in"],
    base: BaseWeight,
) -> tuple[Float[Tensor, " out"], AxisGain]:
    """D = m/‖W + B·A‖_row of rows or of groups of consecutive rows, and the gains g = D - 1."""
    zero = zero_gain(A, base)
    group = len(B) // len(magnitude)
    norms, roundoff = row_norms(zero, torch.ones_like(zero.values), B, A, base, group)
    if not bool(norms.isfinite().all() and magnitude.isfinite().all()):
        raise IncompatibleError("the factors or magnitudes of a DoRA hold NaN or infinity")
    if not bool((norms > roundoff).all()):
        row = int((norms <= roundoff).nonzero()[0])
        raise IncompatibleError(
            f"row {row} of W0 + s·B·A is zero, so its magnitude is meaningless (hosts divide by "
            "zero there); this is not the base model the adapter was trained on"
        )
    D = magnitude.to(norms) / norms
    if not 1 / _FAR_RATIO < float(D.abs().median()) < _FAR_RATIO:
        warn(
            "the magnitudes of a DoRA are far from the norms of W0 + s·B·A, so this is probably "
            "not the base model it was trained on"
        )
    D = D.repeat_interleave(group)
    return D, dataclasses.replace(zero, values=D - 1)


class RowNorms(NamedTuple):
    """Norms, and the size of their roundoff: smaller norms are zero."""

    norms: Float[Tensor, " n"]
    roundoff: Float[Tensor, " n"]


@full_precision
def row_norms(
    gain: AxisGain,
    D: Float[Tensor, " out"],
    B: Float[Tensor, "out rank"],
    A: Float[Tensor, "rank in"],
    base: BaseWeight,
    group: int = 1,
) -> RowNorms:
    """‖D_i·w_i + b_i·A‖ of rows, or of groups of rows, in the basis precision; O(out·rank²)."""
    # ‖D_i·w_i + b_i·A‖² = D_i²·‖w_i‖² + 2·D_i·b_i·(A·w_iᵀ) + b_i·(A·Aᵀ)·b_iᵀ
    dtype = working_dtype(B, A)
    b, a = B.to(dtype), A.to(dtype)
    own = D.square() * gain.squares
    if gain.overlap.dtype == dtype:
        low = row_dots(b @ (a @ a.mT), b)
    else:  # rows of A are nearly dependent: their Gram matrix would lose the remaining digits
        R = torch.linalg.qr(a.mT.to(gain.overlap), mode="r").R
        low = (b.to(R) @ R.mT).square().sum(dim=1)
    squares = own + 2 * D * row_dots(b, gain.overlap) + low
    lossy = (squares < CANCELLATION * (own + low)).nonzero()[:, 0]
    if len(lossy):  # the terms cancel: sum the entries of these rows
        W = base.read(dtype, B.device)
        for rows in torch.split(lossy, BLOCK_ROWS):
            block = D[rows, None] * W[rows].to(D) + b[rows].to(D) @ a.to(D)
            squares[rows] = block.square().sum(dim=1)
    norms, terms = (
        x.clamp(min=0).reshape(-1, group).sum(dim=1).sqrt() for x in (squares, own + low)
    )
    return RowNorms(norms, RANK_RTOL[dtype] * terms)


@full_precision
def row_dots(
    B: Float[Tensor, "out rank"], other: Float[Tensor, "out rank"]
) -> Float[Tensor, " out"]:
    """Inner products of the rows of B with the rows of `other`, in the basis precision."""
    dtype = working_dtype(B, other)
    dots = torch.einsum("ir,ir->i", B.to(dtype), other.to(dtype))
    return dots.to(basis_dtype(B.device))


@full_precision
def inner_across(rows: AxisGain, columns: AxisGain, base: BaseWeight) -> float:
    """⟨diag(g)·W, W·diag(h)⟩ = gᵀ(W∘W)h, in blocks of rows."""
    W = base.read(working_dtype(rows.overlap), rows.values.device)
    total = 0.0
    for start in range(0, len(W), BLOCK_ROWS):
        block = W[start : start + BLOCK_ROWS].to(columns.values).square()
        total += float(rows.values[start : start + BLOCK_ROWS] @ (block @ columns.values))
    return total


def is_same_tensor(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are equal in dtype, device and values, or both None."""
    if left is None or right is None:
        return left is right
    alike = (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
    return left is right or (alike and torch.equal(left, right))


def is_same_gain(left: Gain | Magnitude | None, right: Gain | Magnitude | None) -> bool:
    """Whether two gains are one object, or equal magnitudes on one base model."""
    if left is right:
        return True
    if not (isinstance(left, Magnitude) and isinstance(right, Magnitude)):
        return False
    same = (left.axis, left.base.source) == (right.axis, right.base.source)
    return same and is_same_tensor(left.values, right.values)


def require_same_base(left: Gain | Magnitude, right: Gain | Magnitude) -> None:
    """Raise `IncompatibleError` for gains of different base models, which cannot be added."""
    if left.base.source != right.base.source:
        raise IncompatibleError(
            f"two DoRAs were read with different base models ({left.base.source} and "
            f"{right.base.source}); read all adapters with the same one, a loaded model with the "
            "same object"
        )
