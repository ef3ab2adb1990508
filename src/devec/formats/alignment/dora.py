"""DoRAs whose rows are taken apart, and put together again.

A magnitude of an output belongs to one row of the weight and goes where the row goes. One of an
input belongs to all rows; then it is the gains that all pieces have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from devec.deltas.base_weight import BaseWeight, ConcatenatedWeight, WeightRows
from devec.deltas.delta import Delta
from devec.deltas.dora import as_magnitudes, two_axes_reason
from devec.deltas.gains import AxisGain, Gain, Magnitude
from devec.errors import UnsupportedError
from devec.formats.magnitudes import axes_of


def sliceable(delta: Delta) -> Delta:
    """A delta whose rows can be taken: with gains, where magnitudes are those of inputs."""
    of_inputs = isinstance(delta.gain, Magnitude) and delta.gain.axis == "in"
    return delta.resolved() if of_inputs else delta


def rows_of(delta: Delta, start: int, stop: int) -> Delta:
    """Some rows of a delta: those of B, with A shared.

    Args:
        delta: A delta that is `sliceable`.
        start: First row.
        stop: Row after the last.

    Returns:
        The delta of the rows, exact. Where inputs have gains the base weight is read.
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


def with_magnitudes(pieces: Sequence[Delta], whole: BaseWeight) -> list[Delta]:
    """Pieces one under the other, some of which are DoRAs of outputs, all as such DoRAs.

    Args:
        pieces: The pieces.
        whole: The base weight of them all, read for those that are plain LoRAs.

    Returns:
        The pieces with magnitudes.
    """
    result, start = [], 0
    for piece in pieces:
        stop = start + piece.shape[0]
        result.append(as_magnitudes(piece, "out", WeightRows(whole, start, stop)))
        start = stop
    return result


def one_axis(pieces: Sequence[Delta]) -> str:
    """The axis that the gains of pieces are on.

    Args:
        pieces: The pieces.

    Returns:
        ``"out"``, ``"in"``, or an empty string if there are no gains.

    Raises:
        UnsupportedError: If there are gains on both axes.
    """
    axes = set().union(*map(axes_of, pieces))
    if len(axes) > 1:
        raise UnsupportedError(two_axes_reason())
    return next(iter(axes), "")


def stacked_magnitude(pieces: Sequence[Delta]) -> Magnitude:
    """The magnitudes of pieces one under the other, which have magnitudes of their outputs."""
    gains = [piece.gain for piece in pieces if piece.gain is not None]
    values = [gain.values for gain in gains if isinstance(gain, Magnitude)]
    return Magnitude(torch.cat(values), "out", ConcatenatedWeight([gain.base for gain in gains]))


def common_gain(pieces: Sequence[Delta], product: Delta) -> Gain:
    """The gains of inputs that pieces one under the other have in common.

    Args:
        pieces: The pieces, resolved.
        product: The factors of them all.

    Returns:
        The gains beside those factors; the base weight is read.

    Raises:
        UnsupportedError: If the gains differ from piece to piece.
    """
    gains = [piece.gain for piece in pieces if isinstance(piece.gain, Gain)]
    values = [gain.axes["in"].values for gain in gains]
    if len(gains) < len(pieces) or any(not torch.equal(v, values[0]) for v in values):
        raise UnsupportedError(
            "its parts are DoRAs with other magnitudes of the same inputs (or none), which no "
            "single DoRA represents; --as-lora RANK (devec.as_lora) writes the nearest plain LoRA "
            "and says how near it is"
        )
    base = ConcatenatedWeight([gain.base for gain in gains])
    return Gain(base, {"in": gains[0].axes["in"]}).with_factors(product.B, product.A)
