"""What to write of an adapter as a PEFT directory: its configuration and its tensors.

Where every module still has the rank and scaling that the input's configuration gives it, that
configuration is kept. Otherwise scalings are folded into B, so that alpha = r, and the ranks are
written as patterns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from devec.adapters.layout import Contents, Piece, require_shapes_fit
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.formats.peft.carried import bias_field, copies_beside, keys_beside
from devec.formats.peft.config import is_saved_whole
from devec.formats.peft.dora import peft_dora_rewrites
from devec.formats.peft.names import PREFIX
from devec.formats.peft.slots import PeftSlot, has_biases, padded
from devec.formats.peft.storage import WEIGHTS_NAME, PeftStorage
from devec.formats.peft.units import (
    SlotDeltas,
    deltas_by_slot,
    named_ranks,
    require_apart,
    unit_ranks,
    units_of,
)
from devec.formats.peft.written_config import (
    is_plain_list,
    result_config,
    with_ranks,
    with_targets,
    write_beside,
)
from devec.formats.plan import FilePlan
from devec.formats.rank_patterns import Config
from devec.formats.rewrites import Rewrite
from devec.lazy import joined, outlines, renamed


def planned(
    storage: PeftStorage, contents: Contents, dtype: torch.dtype | None
) -> tuple[Config, FilePlan]:
    """The configuration to write, and the plan of the weights file, from outlines alone."""
    known = {name: delta.outline for name, delta in outlines(contents.modules).items()}
    require_shapes_fit({n: slot.shape for slot in storage.slots for n in slot.modules}, known)
    dora = any(delta.gain is not None for delta in known.values())
    units = units_of(storage.slots, dora=dora)
    deltas: SlotDeltas = deltas_by_slot(units, known)
    config = _config_for(storage, contents, deltas, dora=dora)
    rewrites: dict[PeftSlot, Rewrite] = {}
    if dora:
        rewrites = peft_dora_rewrites(config, deltas, storage.weights)
        require_representable(contents.modules)
        deltas = {slot: [rewrites[slot](d) for d in own] for slot, own in deltas.items()}
    as_read, ranks = _as_read(storage, deltas), unit_ranks(units, deltas)
    if not as_read:
        deltas = {slot: padded(own, ranks[slot]) for slot, own in deltas.items() if own}
        config = with_ranks(config, *named_ranks(deltas))
    if not as_read or _targets_more(storage, config):
        config = _with_targets(storage, config, deltas)
    with_bias = bool(config.get("lora_bias"))
    pieces = [
        _slot_piece(
            slot,
            rewrites.get(slot),
            rank=None if as_read else ranks[slot],
            with_bias=with_bias,
            dtype=dtype,
        )
        for slot in deltas
    ]
    adapted = {slot.path for slot, own in deltas.items() if own}
    config, whole = _with_whole_tensors(storage, contents, config, adapted)
    plan = FilePlan(
        modules=contents.modules,
        pieces=pieces,
        whole=whole,
        strings=lambda _: {"format": "pt"},
        file=WEIGHTS_NAME,
        beside=partial(write_beside, contents.name, config, contents.provenance),
    )
    return config, plan


def _config_for(
    storage: PeftStorage, contents: Contents, deltas: SlotDeltas, *, dora: bool
) -> Config:
    """The input's configuration, without the fields that do not hold for the result."""
    config = result_config(storage.config, carried=bool(contents.carried))
    require_apart(config, deltas, (key.removeprefix(PREFIX) for key in contents.carried))
    for name, value in {"lora_bias": has_biases(deltas), "use_dora": dora}.items():
        if value != bool(config.get(name)):
            config[name] = value
    return config


def _as_read(storage: PeftStorage, deltas: SlotDeltas) -> bool:
    """Whether ranks and scalings are still those of the input's configuration."""
    return not storage.merged_from and all(
        own and all(d.rank == slot.rank and d.scaling == slot.scaling for d in own)
        for slot, own in deltas.items()
    )


def _targets_more(storage: PeftStorage, config: Config) -> bool:
    """Whether a configuration that was read targets modules that the result does not have."""
    tied = config.get("ensure_weight_tying") and not config.get("modules_to_save")
    return bool(tied) or any(not is_saved_whole(config, name) for name in storage.unlisted)


def _with_targets(storage: PeftStorage, config: Config, deltas: SlotDeltas) -> Config:
    """A configuration that targets exactly the slots with deltas."""
    targets = dict.fromkeys(slot.target for slot in deltas if not slot.parameters)
    missing = [slot.target for slot in storage.slots if slot not in deltas]
    return with_targets(
        config,
        list(targets),
        [name for name in (*missing, *storage.unlisted) if name not in targets],
        listed=all(map(is_plain_list, storage.merged_from or (storage.config,))),
    )


def _with_whole_tensors(
    storage: PeftStorage, contents: Contents, config: Config, adapted: Collection[str]
) -> tuple[Config, Mapping[str, Tensor]]:
    """The configuration and the whole tensors, under the keys that PEFT reads beside factors."""
    keys = keys_beside(config, contents.carried, adapted)
    if config.get("bias", "none") != (bias := bias_field(config, keys.values())):
        config = {**config, "bias": bias}
    missing = {slot.path for slot in storage.slots} - set(adapted)
    bases = copies_beside(storage.base_copies, contents.carried, adapted, missing)
    copies = {bases[k]: t for k, t in storage.base_copies.items() if k in bases}
    return config, joined(copies, renamed(contents.carried, keys))


def _slot_piece(
    slot: PeftSlot,
    rewrite: Rewrite | None,
    *,
    rank: int | None,
    with_bias: bool,
    dtype: torch.dtype | None,
) -> Piece:
    """The piece of a slot, padded to a rank if one is given."""

    def tensors(modules: Mapping[str, Delta]) -> dict[str, Tensor]:
        deltas = slot.deltas(modules, always=True)
        deltas = deltas if rewrite is None else [rewrite(delta) for delta in deltas]
        deltas = deltas if rank is None else padded(deltas, rank)
        return slot.write(deltas, with_bias=with_bias, dtype=dtype)

    return Piece(slot.name, tuple(slot.modules), tensors)
