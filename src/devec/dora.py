"""From gains back to magnitudes: any change on one axis as a single DoRA.

A host computes W' = D·(W0 + B·A) with D = diag(m/‖W0 + B·A‖). A delta with the gains g is that DoRA
with D' = 1 + g, B'' = B/D' and m' = D'·‖W0 + B''·A‖ = ±‖D'·W0 + B·A‖.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from devec.delta import Delta
from devec.errors import IncompatibleError, UnsupportedError
from devec.gain import Axis, AxisGain, Gain, Magnitude, no_gain, oriented, row_norms
from devec.weights import BaseWeight

# B'' is 1/D' times the delta's own factor, and so are a host's activations between its two
# products: a thousand times larger ones leave the range of half precision.
_SMALLEST = 1e-3
_MARGIN = 1e-5


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
    delta = delta.resolved().folded()
    axes = delta.gain.axes if isinstance(delta.gain, Gain) else {}
    if any(other != axis for other in axes):
        raise UnsupportedError(one_axis_only())
    base = delta.gain.base if isinstance(delta.gain, Gain) else base
    B, A, weight = oriented(delta.B, delta.A, base, axis)
    known = axes.get(axis) or no_gain(A, weight)
    D = 1 + known.values
    vanishing = D.abs() < _SMALLEST
    if bool((vanishing & (B != 0).any(dim=1)).any()):
        raise IncompatibleError(f"1 + g is {float(D[vanishing][0]):.3g}, too near zero")
    norms = row_norms(known, D, B, A, weight, group)
    sign = torch.where(D.reshape(-1, group)[:, 0] < 0, -1.0, 1.0)
    B = torch.where(vanishing[:, None], 0, B / D[:, None]).to(delta.dtype)
    magnitude = Magnitude((sign * norms).to(delta.dtype), axis, base)
    B, A = (B, delta.A) if axis == "out" else (delta.B, B.mT)
    return dataclasses.replace(delta, B=B, A=A, gain=magnitude)


def require_representable(modules: Mapping[str, Delta]) -> None:
    """Refuse sums of DoRAs that no single DoRA stands for, before any of them is written.

    Args:
        modules: The modules of an adapter.

    Raises:
        UnsupportedError: If a module has gains on both axes.
        IncompatibleError: If 1 + g is nearly zero in a module. The message names it and the largest
            coefficient by which the whole adapter could be multiplied instead.
    """
    gains = {
        m: dict(delta.gain.axes) for m, delta in modules.items() if isinstance(delta.gain, Gain)
    }
    for module, axes in gains.items():
        if len(axes) > 1:
            raise UnsupportedError(f"module {module!r}: {one_axis_only()}")
    held = {m: _divided_by(modules[m], *axes.popitem()) for m, axes in gains.items()}
    nearest = {m: float((1 + g).abs().min()) for m, g in held.items() if len(g)}
    worst = min(nearest, key=lambda module: nearest[module], default="")
    if worst and nearest[worst] < _SMALLEST:
        raise IncompatibleError(
            f"module {worst!r}: with these coefficients 1 + g, what the DoRA multiplies the base "
            f"weight by, is {nearest[worst]:.3g}; below {_SMALLEST:g} none can be written. The "
            f"largest coefficient that works is {_largest(torch.cat(list(held.values()))):.4g} "
            "times the ones asked for"
        )


def _divided_by(delta: Delta, axis: Axis, gain: AxisGain) -> torch.Tensor:
    """The gains g of rows whose factor is to be divided by 1 + g."""
    factor = delta.B if axis == "out" else delta.A.mT
    return gain.values[(factor != 0).any(dim=1)].cpu()


def one_axis_only() -> str:
    """Why gains on both axes cannot be written."""
    return (
        "it is a sum of DoRAs with magnitudes of the outputs and of the inputs, which no single "
        "DoRA represents; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA and says "
        "how near it is"
    )


def _largest(gains: torch.Tensor) -> float:
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
    return math.floor(coefficient * digits) / digits
