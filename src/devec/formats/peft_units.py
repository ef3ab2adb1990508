"""The slots of adapters together: those of several, and those that PEFT makes with one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from devec.delta import Delta
from devec.errors import IncompatibleError, OutputError
from devec.formats.peft_slots import EXPERTS, Slot


def held_by(
    slots: Sequence[Slot], modules: Mapping[str, Delta], carried: Iterable[str]
) -> dict[Slot, list[Delta]]:
    """The deltas of each slot.

    Args:
        slots: The slots.
        modules: Name → delta of an adapter.
        carried: Keys of its whole trained tensors. PEFT loads a bias beside factors only.

    Returns:
        Slot → its deltas: none where the adapter changes nothing, zeros where it changes another
        slot of the same unit.
    """
    units = {s.unit for s in slots if any(name in modules for name in s.modules)}
    beside = {key.rpartition(".base_layer.")[0] for key in carried}
    units |= {slot.unit for slot in slots if slot.path in beside}
    return {slot: slot.held(modules, always=slot.unit in units) for slot in slots}


def ranks_of(held: Mapping[Slot, Sequence[Delta]]) -> dict[str, int]:
    """Unit → its rank: the largest in it, and 1 at least, since PEFT knows no rank 0."""
    ranks: dict[str, int] = {}
    for slot, deltas in held.items():
        ranks[slot.unit] = max([1, ranks.get(slot.unit, 0), *(delta.rank for delta in deltas)])
    return ranks


def named_ranks(held: Mapping[Slot, Sequence[Delta]]) -> tuple[dict[str, int], int | None]:
    """The ranks as a configuration names them.

    Args:
        held: Slot → its deltas, of one rank.

    Returns:
        Name of a module or parameter → rank, and the rank that is to need no pattern, if there is
        one.

    Raises:
        OutputError: If there are no slots.
    """
    if not held:
        raise OutputError("the adapter changes no module; there is nothing to write")
    ranks = {n: d[0].rank for slot, d in held.items() for n in slot.parameters or (slot.target,)}
    usual = next((d[0].rank for slot, d in held.items() if slot.unit == EXPERTS), None)
    return ranks, usual


def merged_slots(groups: Iterable[Sequence[Slot]]) -> tuple[Slot, ...]:
    """The slots of several adapters of one base model.

    Args:
        groups: The slots of each.

    Returns:
        One slot for each path.

    Raises:
        IncompatibleError: If a layer is of another kind in one adapter than in another.
    """
    slots: dict[str, Slot] = {}
    for slot in (slot for group in groups for slot in group):
        known = slots.setdefault(slot.path, slot)
        if (known.kind, known.kernel, known.experts) != (slot.kind, slot.kernel, slot.experts):
            raise IncompatibleError(
                f"module {slot.name!r} is {known.kind} {known.kernel or ''} in one adapter and "
                f"{slot.kind} {slot.kernel or ''} in another"
            )
    return tuple(slots.values())


def merged_copies(groups: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The base weights that several adapters of one base model store beside their factors.

    Args:
        groups: Those of each, by key.

    Returns:
        Key → tensor.

    Raises:
        IncompatibleError: If two of them differ.
    """
    copies: dict[str, Tensor] = {}
    for key, tensor in (item for group in groups for item in group.items()):
        if not torch.equal(copies.setdefault(key, tensor), tensor):
            raise IncompatibleError(
                f"the adapters hold different base weights under {key!r}, so they are adapters of "
                "different base models"
            )
    return copies
