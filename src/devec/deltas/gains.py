"""What a DoRA does to the base weight itself: gains, and the magnitudes they are stored as.

Everything is said for rows of W0. An adapter whose magnitudes are on the input axis is the same
thing transposed, with Aᵀ, Bᵀ and W0ᵀ for B, A and W0.

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
from devec.linalg.dtypes import BLOCK_ROWS, CANCELLED, RANK_RTOL, basis_dtype, working_dtype
from devec.linalg.factors import nearly_dependent
from devec.linalg.precision import full_precision

Axis = Literal["out", "in"]
AXES: tuple[Axis, Axis] = ("out", "in")

# Training leaves magnitudes near the norms; at another factor in most rows, the base is another.
_FAR = 4.0


@dataclass(frozen=True, eq=False)
class Magnitude:
    """The magnitudes of a DoRA as they are stored: norms that W0 + s·B·A is brought to.

    W' = diag(m/‖V‖_row)·V on the output axis, W' = V·diag(m/‖V‖_column) on the input axis, with
    V = W0 + s·B·A. On the input axis of a convolution a norm is of all that one channel feeds.

    Attributes:
        values: m, one for each output or for each input channel. Zero and negative ones are valid.
        axis: ``"out"`` (PEFT, diffusers, LyCORIS since 3.2) or ``"in"`` (LyCORIS before it,
            OneTrainer).
        base: The base weight W0.
    """

    values: Float[Tensor, " n"]
    axis: Axis
    base: BaseWeight

    def each(self, change: Callable[[Tensor], Tensor]) -> Magnitude:
        """The same with another tensor for every one."""
        return dataclasses.replace(self, values=change(self.values))


@dataclass(frozen=True, eq=False)
class AxisGain:
    """The gains g of one axis, diag(g)·W, and what is known of W beside factors B·A.

    Attributes:
        values: g, shape (out,).
        overlap: W·Aᵀ, shape (out, rank): with it norms and inner products need W no more. In
            float64 where float32 would lose digits, see `overlap_of`.
        squares: ‖w_i‖², shape (out,).
    """

    values: Float[Tensor, " out"]
    overlap: Float[Tensor, "out rank"]
    squares: Float[Tensor, " out"]

    def each(self, change: Callable[[Tensor], Tensor]) -> AxisGain:
        """The same with another tensor for every one."""
        return AxisGain(*map(change, (self.values, self.overlap, self.squares)))


@dataclass(frozen=True, eq=False)
class Gain:
    """A change of the base weight by gains: diag(g)·W0 + W0·diag(h).

    Attributes:
        base: The base weight W0.
        axes: ``"out"`` → g, ``"in"`` → h; one at least.
    """

    base: BaseWeight
    axes: dict[Axis, AxisGain]

    def scaled(self, weight: float, factor: float) -> Gain | None:
        """The gains times a weight, beside a B times a factor; None if they are zero."""
        axes: dict[Axis, AxisGain] = {}
        for axis, gain in self.axes.items():
            overlap = factor * gain.overlap if axis == "in" else gain.overlap  # W0ᵀ·B or W0·Aᵀ
            axes[axis] = AxisGain(weight * gain.values, overlap, gain.squares)
        return gain_on(self.base, axes)

    @full_precision
    def beside(self, B: Tensor, A: Tensor) -> Gain:
        """The same gains beside other factors, of this base weight; O(out·in·rank)."""
        axes: dict[Axis, AxisGain] = {}
        for axis, gain in self.axes.items():
            _, factor, weight = oriented(B, A, self.base, axis)
            axes[axis] = dataclasses.replace(no_gain(factor, weight), values=gain.values)
        return Gain(self.base, axes)

    def each(self, change: Callable[[Tensor], Tensor]) -> Gain:
        """The same with another tensor for every one."""
        return Gain(self.base, {axis: gain.each(change) for axis, gain in self.axes.items()})


def gain_on(base: BaseWeight, axes: dict[Axis, AxisGain]) -> Gain | None:
    """Gains without the axes on which all are zero, None if nothing is left."""
    kept = {a: gain for a, gain in axes.items() if gain.values.is_meta or bool(gain.values.any())}
    return Gain(base, kept) if kept else None


def oriented(
    B: Tensor, A: Tensor, base: BaseWeight, axis: Axis
) -> tuple[Tensor, Tensor, BaseWeight]:
    """Factors and base weight such that the axis is that of the rows."""
    return (B, A, base) if axis == "out" else (A.mT, B.mT, transposed(base))


@full_precision
def overlap_of(A: Float[Tensor, "rank in"], base: BaseWeight) -> Float[Tensor, "out rank"]:
    """W·Aᵀ in the working precision, or in float64 where rows of A nearly depend on each other.

    Products b·A of rows of B then cancel most of their terms, and so do b·(W·Aᵀ)ᵀ. With Aᵀ = Q·R
    the overlap is (W·Q)·R, whose rounding is that of orthonormal columns.

    Args:
        A: The factor.
        base: W.

    Returns:
        The overlap; O(out·in·rank).
    """
    dtype = working_dtype(A)
    W, A = base.read(dtype, A.device), A.to(dtype)
    if dtype == basis_dtype(A.device) or not nearly_dependent(A):
        return W @ A.mT
    Q, R = torch.linalg.qr(A.mT.to(basis_dtype(A.device)))
    overlap: Tensor = (W @ Q.to(dtype)).to(R) @ R
    return overlap


@full_precision
def no_gain(A: Float[Tensor, "rank in"], base: BaseWeight) -> AxisGain:
    """Gains of zero beside a factor A, with what is to be known of W.

    Args:
        A: The factor.
        base: W.

    Returns:
        The gains; O(out·in·rank).

    Raises:
        FormatError: If W is not finite.
    """
    dtype = working_dtype(A)
    if not isinstance(base, HeldWeight) or base.tensor.dtype != dtype:
        base = HeldWeight(base.read(dtype, A.device))
    squares = base.row_squares
    if not bool(torch.isfinite(squares).all()):
        rows = int((~torch.isfinite(squares)).sum())
        raise FormatError(f"the base weight holds NaN or infinity in {rows} of its rows")
    return AxisGain(torch.zeros_like(squares), overlap_of(A, base), squares)


@full_precision
def gain_of(
    magnitude: Float[Tensor, " n"],
    B: Float[Tensor, "out rank"],
    A: Float[Tensor, "rank in"],
    base: BaseWeight,
) -> tuple[Float[Tensor, " out"], AxisGain]:
    """Gains from the magnitudes of rows: D = m/‖W + B·A‖_row, g = D - 1.

    Args:
        magnitude: m; one for each row or for each group of rows that follow each other.
        B: Left factor, scaling included.
        A: Right factor.
        base: W.

    Returns:
        D and the gains, exact to rounding of the working precision.

    Raises:
        IncompatibleError: If a row of W + B·A is zero, to which no gain gives a norm, or a value is
            not finite.

    Cost: O(out·in·rank), one pass over W.
    """
    known = no_gain(A, base)
    group = len(B) // len(magnitude)
    norms, level = row_norms(known, torch.ones_like(known.values), B, A, base, group)
    if not bool(norms.isfinite().all() and magnitude.isfinite().all()):
        raise IncompatibleError("the factors or magnitudes of a DoRA hold NaN or infinity")
    if not bool((norms > level).all()):
        row = int((norms <= level).nonzero()[0])
        raise IncompatibleError(
            f"row {row} of W0 + s·B·A is zero, so that its magnitude means nothing (hosts divide "
            "by zero there); this is not the base model the adapter was trained on"
        )
    D = magnitude.to(norms) / norms
    if not 1 / _FAR < float(D.abs().median()) < _FAR:
        warn(
            "the magnitudes of a DoRA are far from the norms of W0 + s·B·A, so this is hardly the "
            "base model it was trained on"
        )
    D = D.repeat_interleave(group)
    return D, dataclasses.replace(known, values=D - 1)


class RowNorms(NamedTuple):
    """Norms, and the level below which they are rounding."""

    norms: Float[Tensor, " n"]
    level: Float[Tensor, " n"]


@full_precision
def row_norms(
    known: AxisGain,
    D: Float[Tensor, " out"],
    B: Float[Tensor, "out rank"],
    A: Float[Tensor, "rank in"],
    base: BaseWeight,
    group: int = 1,
) -> RowNorms:
    """‖D_i·w_i + b_i·A‖ of every row, or of every group of rows, without forming them.

    ‖D_i·w_i + b_i·A‖² = D_i²·‖w_i‖² + 2·D_i·b_i·(A·w_iᵀ) + b_i·(A·Aᵀ)·b_iᵀ.

    Args:
        known: Overlap and squares of W.
        D: What each row of W is multiplied by.
        B: Left factor.
        A: Right factor.
        base: W, read again only for rows of which the sum cancels most.
        group: How many rows make up one norm.

    Returns:
        The norms and what of them would be rounding, in the basis precision.

    Cost: O(out·rank²).
    """
    dtype = working_dtype(B, A)
    b, a = B.to(dtype), A.to(dtype)
    own = D.square() * known.squares
    if known.overlap.dtype == dtype:
        low = row_dots(b @ (a @ a.mT), b)
    else:  # rows of A nearly depend on each other: their Gram matrix would lose what is left
        R = torch.linalg.qr(a.mT.to(known.overlap), mode="r").R
        low = (b.to(R) @ R.mT).square().sum(dim=1)
    squares = own + 2 * D * row_dots(b, known.overlap) + low
    lossy = (squares < CANCELLED * (own + low)).nonzero()[:, 0]
    if len(lossy):
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
    """The inner product of each row of B with the same row of another; in the basis precision."""
    dtype = working_dtype(B, other)
    dots = torch.einsum("ir,ir->i", B.to(dtype), other.to(dtype))
    return dots.to(basis_dtype(B.device))


@full_precision
def inner_across(rows: AxisGain, columns: AxisGain, base: BaseWeight) -> float:
    """⟨diag(g)·W, W·diag(h)⟩ = gᵀ(W∘W)h, by blocks of rows."""
    W = base.read(working_dtype(rows.overlap), rows.values.device)
    total = 0.0
    for start in range(0, len(W), BLOCK_ROWS):
        block = W[start : start + BLOCK_ROWS].to(columns.values).square()
        total += float(rows.values[start : start + BLOCK_ROWS] @ (block @ columns.values))
    return total


def identical(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are identical, or both missing."""
    if left is None or right is None:
        return left is right
    alike = (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
    return left is right or (alike and torch.equal(left, right))


def same_gain(left: Gain | Magnitude | None, right: Gain | Magnitude | None) -> bool:
    """Whether gains are the same object, or the same magnitudes of the same base model."""
    if left is right:
        return True
    if not (isinstance(left, Magnitude) and isinstance(right, Magnitude)):
        return False
    same = (left.axis, left.base.source) == (right.axis, right.base.source)
    return same and identical(left.values, right.values)


def require_same_base(left: Gain | Magnitude, right: Gain | Magnitude) -> None:
    """Refuse gains of different base weights: their sum is no gain of either.

    Args:
        left: Gains.
        right: Others.

    Raises:
        IncompatibleError: If the base weights are of different models.
    """
    if left.base.source != right.base.source:
        raise IncompatibleError(
            f"two DoRAs were read with different base models ({left.base.source} and "
            f"{right.base.source}); read all adapters with the same one, a loaded model with the "
            "same object"
        )
