"""From gains back to magnitudes: any delta with gains on one axis as a single DoRA.

A host computes W' = D·(W0 + B·A) with D = diag(m/‖W0 + B·A‖). A delta with the gains g is the DoRA
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
    oriented,
    row_dots,
    row_norms,
    zero_gain,
)
from devec.errors import IncompatibleError, UnsupportedError
from devec.lazy import outlines
from devec.linalg.dtypes import RANK_RTOL, working_dtype
from devec.linalg.precision import full_precision

# B'' is 1/D' times the delta's own B. Activations between a host's two products grow likewise and
# would leave the range of half precision at a thousand times their size.
_SMALLEST_MULTIPLIER = 1e-3
_MARGIN = 1e-5


@full_precision
def as_magnitudes(delta: Delta, axis: Axis, base: BaseWeight, group: int = 1) -> Delta:
    """A delta as one DoRA with scaling 1 and magnitudes on this axis, exact to rounding."""
    # Liu et al. 2024, arXiv 2402.09353, Eq. 5, solved for B and m. `base` is the base weight of a
    # LoRA that is written among DoRAs; `group` inputs of a convolution, its kernel, share a
    # magnitude. The cost is O(out·rank²), and one pass over W0 for a LoRA or if terms cancel.
    if isinstance(delta.gain, Magnitude) and delta.gain.axis == axis:
        return delta
    if delta.B.is_meta:
        return _magnitude_outline(delta, axis, base, group)
    delta = delta.resolved().folded()
    axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
    if any(other != axis for other in axes):
        raise UnsupportedError(two_axes_reason())
    base = delta.gain.base if isinstance(delta.gain, Gain) else base
    B, A, weight = oriented(delta.B, delta.A, base, axis)
    gain = axes.get(axis) or zero_gain(A.to(delta.dtype), weight)
    D = 1 + gain.values
    small = D.abs() < _SMALLEST_MULTIPLIER
    if bool(small.any()) and bool((small & _changed_rows(B, A, gain)).any()):
        raise IncompatibleError(f"1 + g is {float(D[small].abs().min()):.3g}, too close to zero")
    B = torch.where(small[:, None], 0, B)
    norms, roundoff = row_norms(gain, D, B, A, weight, group)
    sign = torch.where(D.reshape(-1, group)[:, 0] < 0, -1.0, 1.0)
    zero = norms <= roundoff
    B = torch.where(small[:, None], 0, B / D[:, None]).to(delta.dtype)
    B = _with_direction(B, A, gain, zero.repeat_interleave(group))
    m = torch.where(zero, 0, sign * norms).to(delta.dtype)
    B, A = (B, delta.A) if axis == "out" else (delta.B, B.mT)
    return dataclasses.replace(delta, B=B, A=A, gain=Magnitude(m, axis, base))


def _magnitude_outline(delta: Delta, axis: Axis, base: BaseWeight, group: int) -> Delta:
    """The outline of the result of `as_magnitudes`, from the outline of a delta."""
    size = delta.shape[AXES.index(axis)]
    m = torch.empty(size // group, dtype=delta.dtype, device="meta")
    return dataclasses.replace(delta.folded(), gain=Magnitude(m, axis, base))


def _changed_rows(B: Tensor, A: Tensor, gain: AxisGain) -> Tensor:
    """Mask of the rows in which B·A is more than rounding relative to W0 and the largest row."""
    dtype = working_dtype(B, A)
    B, A = B.to(dtype), A.to(dtype)
    squares = row_dots(B @ (A @ A.mT), B)
    if not len(squares):
        return squares > 0
    return squares > RANK_RTOL[dtype] ** 2 * torch.maximum(gain.squares, squares.max())


def _with_direction(B: Tensor, A: Tensor, gain: AxisGain, zero: Tensor) -> Tensor:
    """The factor B, with a direction in rows of magnitude 0."""
    # Hosts divide by the norm of W0 + B·A, even if the magnitude is 0. A row of W0 provides the
    # direction; if it is zero as well, a row of A does.
    undirected = zero & (gain.squares == 0)
    result = torch.where(zero[:, None], 0, B)
    if bool(undirected.any()):
        lengths = torch.linalg.vector_norm(A, dim=1)
        if not bool(lengths.any()):
            row = int(undirected.nonzero()[0])
            raise IncompatibleError(
                f"row {row} of W0 is zero and nothing is added to it, so it has no direction that "
                "a DoRA could rescale to a magnitude (hosts divide by zero there)"
            )
        result[undirected, int(lengths.argmax())] = 1.0
    return result


@full_precision
def require_representable(modules: Mapping[str, Delta]) -> None:
    """Raise a `DevecError` if no single DoRA represents a module, before any is written."""
    gained = [m for m, delta in outlines(modules).items() if isinstance(delta.gain, Gain)]
    nearest: dict[str, float] = {}
    for module in gained:
        delta = modules[module]
        axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
        if len(axes) > 1:
            raise UnsupportedError(f"module {module!r}: {two_axes_reason()}")
        if any(_smallest_multiplier(gain.values) < _SMALLEST_MULTIPLIER for gain in axes.values()):
            nearest[module] = _smallest_multiplier(_gains_of_changed_rows(delta))
    worst = min(nearest, key=lambda module: nearest[module], default="")
    if worst and nearest[worst] < _SMALLEST_MULTIPLIER:
        share = _largest_coefficient(
            torch.cat([_gains_of_changed_rows(modules[module]) for module in gained])
        )
        raise IncompatibleError(
            f"module {worst!r}: 1 + g, the factor by which the DoRA multiplies a row of the base "
            f"weight, would be {nearest[worst]:.3g} in size; below {_SMALLEST_MULTIPLIER:g} it "
            f"cannot be written. The largest coefficient that works is {share:.4g} times the "
            "requested one; or write the nearest plain LoRA (--as-lora RANK, devec.as_lora)"
        )


def _smallest_multiplier(gains: Tensor) -> float:
    """The smallest |1 + g|."""
    return float((1 + gains).abs().min()) if len(gains) else math.inf


def _gains_of_changed_rows(delta: Delta) -> Tensor:
    """The gains g of the rows in which B·A is not zero, where B is divided by 1 + g."""
    axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
    ((axis, gain),) = axes.items()
    B, A = (delta.B, delta.A) if axis == "out" else (delta.A.mT, delta.B.mT)
    return gain.values[_changed_rows(B, A, gain)].cpu()


def two_axes_reason() -> str:
    """The reason why gains on both axes cannot be written, and the remedy."""
    return (
        "it is a sum of DoRAs with magnitudes of the outputs and of the inputs, which no single "
        "DoRA represents; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA and states "
        "its error"
    )


def _largest_coefficient(gains: Tensor) -> float:
    """The largest coefficient c ≤ 1 at which no 1 + c·g is nearly zero, cut to four digits."""
    # row i with g_i < 0 excludes (1 - ε)/|g_i| to (1 + ε)/|g_i|, and a margin for rounding
    crossing = -gains[gains < 0]
    low, high = (
        (1 - _SMALLEST_MULTIPLIER - _MARGIN) / crossing,
        (1 + _SMALLEST_MULTIPLIER) / crossing,
    )
    coefficient = 1.0
    while bool((excluded := (low < coefficient) & (coefficient < high)).any()):
        coefficient = float(low[excluded].min())
        digits = 10.0 ** (3 - math.floor(math.log10(coefficient)))
        coefficient = math.floor(coefficient * digits) / digits
    return coefficient


def axes_of(delta: Delta) -> set[Axis]:
    """The axes on which a delta has magnitudes or gains."""
    if isinstance(delta.gain, Gain):
        return set(delta.gain.axes)
    return set() if delta.gain is None else {delta.gain.axis}
