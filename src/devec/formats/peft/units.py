"""The slots of adapters together: those of several, and those that PEFT makes with one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, OutputError, UnsupportedError, listed
from devec.formats.peft.carried import replaced
from devec.formats.peft.slots import EXPERTS, Slot
from devec.formats.rank_patterns import Config


def units_of(slots: Sequence[Slot], *, dora: bool) -> dict[Slot, str]:
    """Slot → the unit that PEFT makes it in; PEFT has no DoRA of any that is more than one slot."""
    return {slot: slot.path if dora else slot.unit for slot in slots}


def held_by(units: Mapping[Slot, str], modules: Mapping[str, Delta]) -> dict[Slot, list[Delta]]:
    """The deltas of each slot.

    Args:
        units: Slot → its unit.
        modules: Name → delta of an adapter.

    Returns:
        Slot → its deltas: none where the adapter changes nothing, zeros where it changes another
        slot of the same unit.
    """
    changed = {
        unit for slot, unit in units.items() if any(name in modules for name in slot.modules)
    }
    return {slot: slot.held(modules, always=unit in changed) for slot, unit in units.items()}


def require_apart(
    config: Config, held: Mapping[Slot, Sequence[Delta]], carried: Iterable[str]
) -> None:
    """Refuse deltas of layers that are trained whole, which PEFT does not adapt.

    Args:
        config: The configuration to write.
        held: Slot → its deltas.
        carried: Keys of the whole trained tensors beside them, without PEFT's prefix.

    Raises:
        IncompatibleError: If there is one.
    """
    twice = replaced(config, carried, [slot.name for slot, deltas in held.items() if deltas])
    if twice:
        raise IncompatibleError(
            f"the factors of {listed(twice)} cannot be written beside whole trained tensors of the "
            "same layers, which PEFT does not adapt; leave the tensors out (carried_from='none', "
            "--carried-from none) or the factors"
        )


def ranks_of(units: Mapping[Slot, str], held: Mapping[Slot, Sequence[Delta]]) -> dict[Slot, int]:
    """Slot → its rank: the largest in its unit, and 1 at least, since PEFT knows no rank 0."""
    ranks: dict[str, int] = {}
    for slot, unit in units.items():
        ranks[unit] = max([1, ranks.get(unit, 0), *(delta.rank for delta in held[slot])])
    return {slot: ranks[unit] for slot, unit in units.items()}


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
        UnsupportedError: If it is adapted inside a wrapper in one and outside of it in another.
    """
    slots: dict[str, Slot] = {}
    for slot in (slot for group in groups for slot in group):
        known = slots.setdefault(slot.path, slot)
        if (known.kind, known.kernel, known.experts) != (slot.kind, slot.kernel, slot.experts):
            raise IncompatibleError(
                f"module {slot.name!r} is {known.kind} {known.kernel or ''} in one adapter and "
                f"{slot.kind} {slot.kernel or ''} in another"
            )
    _require_one_place(slots.values())
    return tuple(slots.values())


def _require_one_place(slots: Iterable[Slot]) -> None:
    """Refuse a layer that has factors under two names: of its own, and as part of an attention."""
    first: dict[str, Slot] = {}
    for slot in slots:
        known = first.setdefault(slot.base_name, slot)
        if known.path != slot.path and not (known.parameters or slot.parameters):
            raise UnsupportedError(
                f"{known.name!r} and {slot.name!r} are one layer, adapted as part of "
                "nn.MultiheadAttention in one adapter and by itself in another; PEFT would load "
                "only one of them, so train both with the same target_modules"
            )


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
