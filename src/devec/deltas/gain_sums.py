"""Sums and inner products of the gains of two deltas of one module."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.gains import (
    AXES,
    Axis,
    AxisGain,
    Gain,
    Magnitude,
    base_overlap,
    inner_across,
    nonzero_gain,
    oriented,
    require_same_base,
    row_dots,
)
from devec.linalg.precision import full_precision


@runtime_checkable
class Terms(Protocol):
    """The terms of a resolved delta: factors, scaling and gains."""

    @property
    def B(self) -> Tensor:  # noqa: N802
        """Output-side factor, shape (out, rank)."""

    @property
    def A(self) -> Tensor:  # noqa: N802
        """Input-side factor, shape (rank, in)."""

    @property
    def scaling(self) -> float:
        """Factor of the low-rank term."""

    @property
    def gain(self) -> Gain | Magnitude | None:
        """The gains; no magnitudes once the delta is resolved."""

    @property
    def dtype(self) -> torch.dtype:
        """The working precision of the factors."""


def sum_of_gains(left: Terms, right: Terms) -> Gain | None:
    """The gains of a sum of deltas with scaling 1; overlaps concatenate as the factors do."""
    gains = _require_one_base(left, right)
    if not gains:
        return None
    base = gains[0].base
    axes: dict[Axis, AxisGain] = {}
    for axis in AXES:
        on_axis = [gain.axes[axis] for gain in gains if axis in gain.axes]
        if on_axis:
            overlap = torch.cat([_overlap(delta, axis, base) for delta in (left, right)], dim=1)
            first, *others = (gain.values for gain in on_axis)
            axes[axis] = AxisGain(sum(others, first), overlap, on_axis[0].squares)
    return nonzero_gain(base, axes)


@full_precision
def gain_inner(left: Terms, right: Terms) -> float:
    """The terms of ⟨ΔW1, ΔW2⟩_F that contain gains."""
    gains = _require_one_base(left, right)
    if not gains:
        return 0.0
    base, total = gains[0].base, 0.0
    left_axes, right_axes = (d.gain.axes if isinstance(d.gain, Gain) else {} for d in (left, right))
    for axis in AXES:
        for factors, axes in ((right, left_axes), (left, right_axes)):
            if axis in axes:
                B, _, _ = oriented(factors.B, factors.A, base, axis)
                dots = row_dots(B, _overlap(factors, axis, base))
                total += factors.scaling * float(axes[axis].values @ dots)
        if axis in left_axes and axis in right_axes:
            first, second = left_axes[axis], right_axes[axis]
            total += float((first.values * second.values) @ first.squares)
    for rows, columns in ((left_axes, right_axes), (right_axes, left_axes)):
        if "out" in rows and "in" in columns:
            total += inner_across(rows["out"], columns["in"], base)
    return total


def _require_one_base(left: Terms, right: Terms) -> list[Gain]:
    """The gains of two deltas; raises `IncompatibleError` if their base weights differ."""
    gains = [delta.gain for delta in (left, right) if isinstance(delta.gain, Gain)]
    if gains:
        require_same_base(gains[0], gains[-1])
    return gains


def _overlap(delta: Terms, axis: Axis, base: BaseWeight) -> Tensor:
    """W0·Aᵀ, or W0ᵀ·B on the input axis: stored beside the gains, or computed from W0."""
    if isinstance(delta.gain, Gain) and axis in delta.gain.axes:
        return delta.gain.axes[axis].overlap
    _, A, weight = oriented(delta.B, delta.A, base, axis)
    return base_overlap(A.to(delta.dtype), weight)
