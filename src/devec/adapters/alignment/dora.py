"""Cutting DoRAs into slices of rows, and joining the slices.

The magnitude of an output belongs to one row of the weight, and goes where the row goes. The
magnitude of an input belongs to all rows; slices then share the gains of the inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from devec.deltas.base_weight import BaseWeight, ConcatenatedWeight, WeightRows
from devec.deltas.delta import Delta
from devec.deltas.dora import as_magnitudes, axes_of, two_axes_reason
from devec.deltas.gains import AxisGain, Gain, Magnitude
from devec.errors import UnsupportedError


def sliceable(delta: Delta) -> Delta:
    """A delta that `rows_of` accepts: magnitudes of inputs are replaced by gains."""
    of_inputs = isinstance(delta.gain, Magnitude) and delta.gain.axis == "in"
    return delta.resolved() if of_inputs else delta


def rows_of(delta: Delta, start: int, stop: int) -> Delta:
    """Rows start to stop of a `sliceable` delta, exact: rows of B, with A shared.

    The base weight is read if inputs have gains.

    Returns:
        The delta of the rows.
    """
    rows = slice(start, stop)
    bias = None if delta.bias is None else delta.bias[rows]
    part = dataclasses.replace(delta, B=delta.B[rows], bias=bias, gain=None)
    if delta.gain is None:
        return part
    base = WeightRows(delta.gain.base, start, stop)
    if isinstance(delta.gain, Magnitude):
        return dataclasses.replace(part, gain=Magnitude(delta.gain.values[rows], "out", base))
    gain = Gain(base, dict(delta.gain.axes))
    if "out" in gain.axes:
        known = gain.axes["out"]
        gain.axes["out"] = AxisGain(known.values[rows], known.overlap[rows], known.squares[rows])
    return dataclasses.replace(
        part, gain=gain.with_factors(part.B, part.A) if "in" in gain.axes else gain
    )


def with_magnitudes(deltas: Sequence[Delta], whole: BaseWeight) -> list[Delta]:
    """Deltas of consecutive rows, all as DoRAs of outputs; base weights of plain LoRAs are read."""
    result, start = [], 0
    for delta in deltas:
        stop = start + delta.shape[0]
        result.append(as_magnitudes(delta, "out", WeightRows(whole, start, stop)))
        start = stop
    return result


def one_axis(deltas: Sequence[Delta]) -> str:
    """The axis of the gains of slices, ``"out"`` or ``"in"``; empty if there are no gains."""
    axes = set().union(*map(axes_of, deltas))
    if len(axes) > 1:
        raise UnsupportedError(two_axes_reason())
    return next(iter(axes), "")


def stacked_magnitude(deltas: Sequence[Delta]) -> Magnitude:
    """The magnitudes of consecutive rows, all of which have magnitudes of outputs."""
    gains = [delta.gain for delta in deltas if delta.gain is not None]
    values = [gain.values for gain in gains if isinstance(gain, Magnitude)]
    return Magnitude(torch.cat(values), "out", ConcatenatedWeight([gain.base for gain in gains]))


def common_gain(deltas: Sequence[Delta], product: Delta) -> Gain:
    """The gains of inputs that resolved slices share, with the factors of the whole module.

    The base weight is read.

    Returns:
        The gains.

    Raises:
        UnsupportedError: If the gains of the slices differ.
    """
    gains = [delta.gain for delta in deltas if isinstance(delta.gain, Gain)]
    values = [gain.axes["in"].values for gain in gains]
    if len(gains) < len(deltas) or any(not torch.equal(v, values[0]) for v in values):
        raise UnsupportedError(
            "its parts are DoRAs with other magnitudes of the same inputs (or none), which no "
            "single DoRA represents; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA "
            "and says how near it is"
        )
    base = ConcatenatedWeight([gain.base for gain in gains])
    return Gain(base, {"in": gains[0].axes["in"]}).with_factors(product.B, product.A)
