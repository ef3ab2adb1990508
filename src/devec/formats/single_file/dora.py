"""DoRAs as they go to a single file: every module with the magnitudes that its readers expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import as_magnitudes
from devec.deltas.gains import Axis
from devec.errors import UnsupportedError, listed, located
from devec.formats.magnitudes import axes_of
from devec.formats.single_file.slot import FileSlot
from devec.naming.module_id import parse_module_id

Form = Callable[[Delta], Delta]


def dora_forms(
    deltas: Mapping[str, Delta],
    slots: Mapping[str, FileSlot],
    weight: Callable[[str], BaseWeight],
    *,
    unchanged: bool,
) -> dict[str, Form]:
    """How deltas get magnitudes for gains.

    PEFT, and so diffusers, takes all modules of a model for DoRAs if one is; there a LoRA becomes
    one, too, with magnitudes that do nothing.

    Args:
        deltas: Module → delta, or its outline.
        slots: Module → where it is stored.
        weight: Gives the base weight of a module, read for LoRAs that become DoRAs.
        unchanged: Whether the deltas are those that a file was read with, which is written again.

    Returns:
        Module → from its delta to that with magnitudes, exact to rounding; modules that are to be
        plain LoRAs are not among them.

    Raises:
        UnsupportedError: If no DoRA of the format is such a delta.
    """
    doras = [m for m, d in deltas.items() if d.gain is not None and slots[m].magnitude.everywhere]
    everywhere = set() if unchanged else {parse_module_id(module).component for module in doras}
    of_doras = [
        module
        for module in deltas
        if everywhere and parse_module_id(module).component in everywhere
    ]
    biased = [module for module in of_doras if deltas[module].bias is not None]
    if biased:
        raise UnsupportedError(
            f"the change of the bias of {listed(biased)} cannot be written: PEFT and diffusers "
            "have none in DoRAs, and other modules are DoRAs"
        )
    return {
        module: partial(_as_dora, slots[module], weight(module))
        for module in dict.fromkeys([*of_doras, *(m for m, d in deltas.items() if d.gain)])
    }


def _as_dora(slot: FileSlot, base: BaseWeight, delta: Delta) -> Delta:
    """A delta with magnitudes."""
    axis: Axis = next(iter(axes_of(delta)), "out")
    what = f"module {slot.id!r}"
    if delta.gain is None:
        what += " (a LoRA that is to be written as a DoRA, as other modules are DoRAs)"
    with located(what):
        return as_magnitudes(delta, axis, base, slot.group(axis))
