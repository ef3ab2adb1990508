"""From gains back to magnitudes: any change on one axis as a single DoRA.

A host computes W' = D·(W0 + B·A) with D = diag(m/‖W0 + B·A‖). A delta with the gains g is that DoRA
with D' = 1 + g, B'' = B/D' and m' = D'·‖W0 + B''·A‖ = ±‖D'·W0 + B·A‖.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.gains import (
    AXES,
    Axis,
    AxisGain,
    Gain,
    Magnitude,
    no_gain,
    oriented,
    row_dots,
    row_norms,
)
from devec.errors import IncompatibleError, UnsupportedError
from devec.lazy import outlines
from devec.linalg.dtypes import RANK_RTOL, working_dtype
from devec.linalg.precision import full_precision

# B'' is 1/D' times the delta's own factor, and so are a host's activations between its two
# products: a thousand times larger ones leave the range of half precision.
_SMALLEST = 1e-3
_MARGIN = 1e-5


@full_precision
def as_magnitudes(delta: Delta, axis: Axis, base: BaseWeight, group: int = 1) -> Delta:
    """A delta as one DoRA: factors, scaling 1 and magnitudes.

    Args:
        delta: The delta. One that has magnitudes of this axis is returned as it is.
        axis: The axis of the magnitudes.
        base: The base weight, for a LoRA that is to be written among DoRAs.
        group: Number of inputs that share a magnitude: the kernel of a convolution.

    Returns:
        The delta with `Magnitude`, exact to rounding of the working precision.

    Raises:
        UnsupportedError: If the delta has gains on the other axis, too.
        IncompatibleError: If 1 + g is nearly zero where B·A is not.

    Cost: O(out·rank²); for a LoRA and where rows cancel, one pass over the base weight.

    Reference: Liu et al. 2024, arXiv 2402.09353, Eq. 5, solved for B and m.
    """
    if isinstance(delta.gain, Magnitude) and delta.gain.axis == axis:
        return delta
    if delta.B.is_meta:
        return _outline(delta, axis, base, group)
    delta = delta.resolved().folded()
    axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
    if any(other != axis for other in axes):
        raise UnsupportedError(one_axis_only())
    base = delta.gain.base if isinstance(delta.gain, Gain) else base
    B, A, weight = oriented(delta.B, delta.A, base, axis)
    known = axes.get(axis) or no_gain(A.to(delta.dtype), weight)
    D = 1 + known.values
    small = D.abs() < _SMALLEST
    if bool(small.any()) and bool((small & _moved(B, A, known)).any()):
        raise IncompatibleError(f"1 + g is {float(D[small].abs().min()):.3g}, too near zero")
    B = torch.where(small[:, None], 0, B)
    norms, level = row_norms(known, D, B, A, weight, group)
    sign = torch.where(D.reshape(-1, group)[:, 0] < 0, -1.0, 1.0)
    off = norms <= level
    B = torch.where(small[:, None], 0, B / D[:, None]).to(delta.dtype)
    B = _with_direction(B, A, known, off.repeat_interleave(group))
    m = torch.where(off, 0, sign * norms).to(delta.dtype)
    B, A = (B, delta.A) if axis == "out" else (delta.B, B.mT)
    return dataclasses.replace(delta, B=B, A=A, gain=Magnitude(m, axis, base))


def _outline(delta: Delta, axis: Axis, base: BaseWeight, group: int) -> Delta:
    """What `as_magnitudes` makes of a delta of which the outline alone is known."""
    size = delta.shape[AXES.index(axis)]
    m = torch.empty(size // group, dtype=delta.dtype, device="meta")
    return dataclasses.replace(delta.folded(), gain=Magnitude(m, axis, base))


def _moved(B: Tensor, A: Tensor, known: AxisGain) -> Tensor:
    """Of which rows B·A is more than rounding, beside W0 and the largest row."""
    dtype = working_dtype(B, A)
    B, A = B.to(dtype), A.to(dtype)
    moves = row_dots(B @ (A @ A.mT), B)
    if not len(moves):
        return moves > 0
    return moves > RANK_RTOL[dtype] ** 2 * torch.maximum(known.squares, moves.max())


def _with_direction(B: Tensor, A: Tensor, known: AxisGain, off: Tensor) -> Tensor:
    """The factor with rows at which the whole weight is zero: any direction, for a magnitude of 0.

    Returns:
        The factor. Hosts divide by the norm of W0 + B·A. A row of W0 has a direction of its own;
        where that is zero, too, one of A is taken.

    Raises:
        IncompatibleError: If there is none.
    """
    lost = off & (known.squares == 0)
    result = torch.where(off[:, None], 0, B)
    if bool(lost.any()):
        lengths = torch.linalg.vector_norm(A, dim=1)
        if not bool(lengths.any()):
            row = int(lost.nonzero()[0])
            raise IncompatibleError(
                f"row {row} of W0 is zero and nothing is added to it, so that it has no direction "
                "that a DoRA could bring to a magnitude (hosts divide by zero there)"
            )
        result[lost, int(lengths.argmax())] = 1.0
    return result


@full_precision
def require_representable(modules: Mapping[str, Delta]) -> None:
    """Refuse sums of DoRAs that no single DoRA stands for, before any of them is written.

    Args:
        modules: The modules of an adapter.

    Raises:
        UnsupportedError: If a module has gains on both axes.
        IncompatibleError: If 1 + g is nearly zero in a module. The message names it and the largest
            coefficient by which the whole adapter could be multiplied instead.
    """
    gained = [m for m, delta in outlines(modules).items() if isinstance(delta.gain, Gain)]
    nearest: dict[str, float] = {}
    for module in gained:
        delta = modules[module]
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        if len(axes) > 1:
            raise UnsupportedError(f"module {module!r}: {one_axis_only()}")
        if any(_nearest(gain.values) < _SMALLEST for gain in axes.values()):
            nearest[module] = _nearest(_divided_by(delta))
    worst = min(nearest, key=lambda module: nearest[module], default="")
    if worst and nearest[worst] < _SMALLEST:
        share = _largest(torch.cat([_divided_by(modules[module]) for module in gained]))
        raise IncompatibleError(
            f"module {worst!r}: 1 + g, what the DoRA multiplies a row of the base weight by, would "
            f"be {nearest[worst]:.3g} in size; below {_SMALLEST:g} none can be written. The "
            f"largest coefficient that works is {share:.4g} times the one asked for; or write the "
            "nearest plain LoRA (--as-lora RANK, devec.as_lora)"
        )


def _nearest(gains: Tensor) -> float:
    """The smallest |1 + g|."""
    return float((1 + gains).abs().min()) if len(gains) else math.inf


def _divided_by(delta: Delta) -> Tensor:
    """The gains g of the rows of a delta whose factor is to be divided by 1 + g."""
    axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
    ((axis, gain),) = axes.items()
    B, A = (delta.B, delta.A) if axis == "out" else (delta.A.mT, delta.B.mT)
    return gain.values[_moved(B, A, gain)].cpu()


def one_axis_only() -> str:
    """Why gains on both axes cannot be written."""
    return (
        "it is a sum of DoRAs with magnitudes of the outputs and of the inputs, which no single "
        "DoRA represents; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA and says "
        "how near it is"
    )


def _largest(gains: Tensor) -> float:
    """The largest coefficient up to 1 at which no 1 + c·g is nearly zero, cut to four digits.

    Returns:
        The coefficient: row i rules out all between (1 - ε)/|g_i| and (1 + ε)/|g_i|, for g_i < 0,
        and a little more for rounding.
    """
    crossing = -gains[gains < 0]
    low, high = (1 - _SMALLEST - _MARGIN) / crossing, (1 + _SMALLEST) / crossing
    coefficient = 1.0
    while bool((ruled_out := (low < coefficient) & (coefficient < high)).any()):
        coefficient = float(low[ruled_out].min())
        digits = 10.0 ** (3 - math.floor(math.log10(coefficient)))
        coefficient = math.floor(coefficient * digits) / digits
    return coefficient


def axes_of(delta: Delta) -> set[Axis]:
    """The axes on which a delta has magnitudes or gains."""
    if isinstance(delta.gain, Gain):
        return set(delta.gain.axes)
    return set() if delta.gain is None else {delta.gain.axis}
