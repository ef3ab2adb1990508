"""The slots of one or several adapters together.

A *unit* is a set of slots that PEFT creates with one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, OutputError, UnsupportedError, listed
from devec.formats.peft.carried import replaced
from devec.formats.peft.slots import EXPERTS, PeftSlot
from devec.formats.rank_patterns import Config

SlotDeltas = Mapping[PeftSlot, Sequence[Delta]]
Units = Mapping[PeftSlot, str]  # slot → name of its unit


def units_of(slots: Sequence[PeftSlot], *, dora: bool) -> dict[PeftSlot, str]:
    """Slot → name of its unit; no unit of a DoRA has several slots."""
    return {slot: slot.path if dora else slot.unit for slot in slots}


def deltas_by_slot(units: Units, modules: Mapping[str, Delta]) -> dict[PeftSlot, list[Delta]]:
    """Slot → its deltas: none if no slot of the unit is changed, zeros if only others are."""
    changed = {
        unit for slot, unit in units.items() if any(name in modules for name in slot.modules)
    }
    return {slot: slot.deltas(modules, always=unit in changed) for slot, unit in units.items()}


def require_apart(config: Config, deltas: SlotDeltas, carried: Iterable[str]) -> None:
    """Refuse deltas of layers that are trained whole: PEFT does not adapt those."""
    twice = replaced(config, carried, [slot.name for slot, own in deltas.items() if own])
    if twice:
        raise IncompatibleError(
            f"the factors of {listed(twice)} cannot be written beside whole trained tensors of the "
            "same layers, which PEFT does not adapt; leave the tensors out (carried_from='none', "
            "--carried-from none) or the factors"
        )


def unit_ranks(units: Units, deltas: SlotDeltas) -> dict[PeftSlot, int]:
    """Slot → its rank: the largest in its unit, at least 1, since PEFT has no rank 0."""
    ranks: dict[str, int] = {}
    for slot, unit in units.items():
        ranks[unit] = max([1, ranks.get(unit, 0), *(delta.rank for delta in deltas[slot])])
    return {slot: ranks[unit] for slot, unit in units.items()}


def named_ranks(deltas: SlotDeltas) -> tuple[dict[str, int], int | None]:
    """The ranks by the names that a configuration has for them.

    Args:
        deltas: Slot → its deltas, of one rank.

    Returns:
        Name of a module or parameter → rank, and the rank that must not need a pattern, if any.

    Raises:
        OutputError: If there are no slots.
    """
    if not deltas:
        raise OutputError("the adapter changes no module; there is nothing to write")
    ranks = {n: d[0].rank for slot, d in deltas.items() for n in slot.parameters or (slot.target,)}
    usual = next((d[0].rank for slot, d in deltas.items() if slot.unit == EXPERTS), None)
    return ranks, usual


def merged_slots(groups: Iterable[Sequence[PeftSlot]]) -> tuple[PeftSlot, ...]:
    """The slots of several adapters of one base model, one for each path."""
    slots: dict[str, PeftSlot] = {}
    for slot in (slot for group in groups for slot in group):
        known = slots.setdefault(slot.path, slot)
        if (known.kind, known.kernel, known.experts) != (slot.kind, slot.kernel, slot.experts):
            raise IncompatibleError(
                f"module {slot.name!r} is {known.kind} {known.kernel or ''} in one adapter and "
                f"{slot.kind} {slot.kernel or ''} in another"
            )
    _require_one_path(slots.values())
    return tuple(slots.values())


def _require_one_path(slots: Iterable[PeftSlot]) -> None:
    """Refuse a layer with factors under two paths: its own, and that of an attention."""
    first: dict[str, PeftSlot] = {}
    for slot in slots:
        known = first.setdefault(slot.base_name, slot)
        if known.path != slot.path and not (known.parameters or slot.parameters):
            raise UnsupportedError(
                f"{known.name!r} and {slot.name!r} are one layer, adapted as part of "
                "nn.MultiheadAttention in one adapter and by itself in another; PEFT would load "
                "only one of them, so train both with the same target_modules"
            )


def merged_copies(groups: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Key → base weight stored beside the factors of any adapter; refused if adapters differ."""
    copies: dict[str, Tensor] = {}
    for key, tensor in (item for group in groups for item in group.items()):
        if not torch.equal(copies.setdefault(key, tensor), tensor):
            raise IncompatibleError(
                f"the adapters hold different base weights under {key!r}, so they are adapters of "
                "different base models"
            )
    return copies
