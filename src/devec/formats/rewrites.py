"""Rewriting deltas as the DoRAs that are written."""

from __future__ import annotations

from collections.abc import Callable

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Axis
from devec.errors import located

Rewrite = Callable[[Delta], Delta]  # to a delta of the same effect


def as_stored_dora(
    module: str, delta: Delta, axis: Axis, base: BaseWeight, group: int = 1
) -> Delta:
    """A delta with magnitudes, exact to rounding; the base weight is read for a plain LoRA."""
    what = f"module {module!r}"
    if delta.gain is None:
        what += " (a LoRA that is to be written as a DoRA, as other modules are DoRAs)"
    with located(what):
        return as_magnitudes(delta, axis, base, group)
