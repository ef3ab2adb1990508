"""DoRAs in single files: which modules get magnitudes, as the readers of each key expect them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from devec.deltas.base_weight import BaseWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import axes_of
from devec.deltas.gains import Axis
from devec.errors import UnsupportedError, listed
from devec.formats.rewrites import Rewrite, as_stored_dora
from devec.formats.single_file.slot import FileSlot
from devec.naming.module_id import parse_module_id


def file_dora_rewrites(
    deltas: Mapping[str, Delta],
    slots: Mapping[str, FileSlot],
    weight: Callable[[str], BaseWeight],
    *,
    unchanged: bool,
) -> dict[str, Rewrite]:
    """How to rewrite deltas with gains, and LoRAs among DoRAs, as DoRAs with magnitudes.

    PEFT, and so diffusers, treats all modules of a model as DoRAs if one is a DoRA. A LoRA is then
    written as a DoRA with the same effect.

    Args:
        deltas: Module → delta or its outline.
        slots: Module → slot.
        weight: Returns the base weight of a module, which is read for plain LoRAs.
        unchanged: Whether the deltas are those that were read from a file.

    Returns:
        Module → rewrite that adds magnitudes, exact to rounding; plain LoRAs are left out.

    Raises:
        UnsupportedError: If the format has no such DoRA.
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
        module: partial(_as_file_dora, slots[module], weight(module))
        for module in dict.fromkeys([*of_doras, *(m for m, d in deltas.items() if d.gain)])
    }


def _as_file_dora(slot: FileSlot, base: BaseWeight, delta: Delta) -> Delta:
    """A delta with magnitudes on the axis of its gains; of outputs for a plain LoRA."""
    axis: Axis = next(iter(axes_of(delta)), "out")
    return as_stored_dora(slot.id, delta, axis, base, slot.group(axis))
