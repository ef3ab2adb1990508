"""DoRAs as they go to a single file: every module with the magnitudes that its readers expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from devec.delta import Delta
from devec.dora import as_magnitudes, require_representable
from devec.errors import UnsupportedError, listed, located
from devec.formats.file_slot import FileSlot
from devec.formats.magnitudes import axes_of
from devec.formats.names import parse
from devec.gain import Axis
from devec.weights import BaseWeight


def as_doras(
    deltas: Mapping[str, Delta],
    slots: Mapping[str, FileSlot],
    weight: Callable[[str], BaseWeight],
    *,
    unchanged: bool,
) -> dict[str, Delta]:
    """The same deltas with magnitudes for gains.

    PEFT, and so diffusers, takes all modules of a model for DoRAs if one is; there a LoRA becomes
    one, too, with magnitudes that do nothing.

    Args:
        deltas: Module → delta.
        slots: Module → where it is stored.
        weight: Gives the base weight of a module, read for LoRAs that become DoRAs.
        unchanged: Whether the deltas are those that a file was read with, which is written again.

    Returns:
        Module → delta without gains or with magnitudes, exact to rounding.

    Raises:
        UnsupportedError: If no DoRA of the format is such a delta.
        IncompatibleError: If a base weight is needed that was not given.
    """
    require_representable(deltas)
    doras = [m for m, d in deltas.items() if d.gain is not None and slots[m].magnitude.everywhere]
    everywhere = set() if unchanged else {parse(module).component for module in doras}
    of_doras = [module for module in deltas if parse(module).component in everywhere]
    biased = [module for module in of_doras if deltas[module].bias is not None]
    if biased:
        raise UnsupportedError(
            f"the change of the bias of {listed(biased)} cannot be written: PEFT and diffusers "
            "have none in DoRAs, and other modules are DoRAs"
        )
    result: dict[str, Delta] = {}
    for module, delta in deltas.items():
        axis: Axis = next(iter(axes_of(delta)), "out")
        made = delta.gain is None and module in of_doras
        what = " (a LoRA that is to be written as a DoRA, as other modules are DoRAs)"
        with located(f"module {module!r}{what if made else ''}"):
            result[module] = delta
            if made or delta.gain is not None:
                group = slots[module].group(axis)
                result[module] = as_magnitudes(delta, axis, weight(module), group)
    return result
