"""What to write of an adapter as a single file: its tensors and the strings of its header."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from devec.adapters.layout import Contents, Piece, require_shapes_fit
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.formats.plan import FilePlan
from devec.formats.rank_patterns import alternation, rank_pattern
from devec.formats.rewrites import Rewrite
from devec.formats.single_file.dora import file_dora_rewrites
from devec.formats.single_file.header import ADAPTER_KEY, header_of_result, header_unchanged
from devec.formats.single_file.slot import FileSlot, exact_alpha, one_alpha, result_slot
from devec.formats.single_file.storage import FileStorage
from devec.lazy import outlines
from devec.naming.module_id import parse_module_id

# UNets whose files diffusers reads with one alpha for all attention layers
_ONE_ALPHA = ("sd", "sd2", "sdxl")


def planned_file(storage: FileStorage, contents: Contents, dtype: torch.dtype | None) -> FilePlan:
    """The plan of the file, from outlines alone."""
    known = outlines(contents.modules)
    require_shapes_fit({slot.id: slot.shape for slot in storage.slots}, known)
    deltas = {s.id: known[s.id].outline for s in storage.slots if s.id in known}
    rewrites, written = _rewrites(storage, contents, deltas)
    by_metadata = _metadata_holds(storage, written)
    if not by_metadata:
        _add_alphas(storage, rewrites, written)
    return FilePlan(
        modules=contents.modules,
        pieces=[
            Piece(slot.id, (slot.id,), partial(_tensors, slot, rewrites[slot.id], dtype))
            for slot in (
                s if contents.unchanged else result_slot(s) for s in storage.slots if s.id in deltas
            )
        ],
        whole=contents.carried,
        strings=lambda digest: _strings(
            storage, contents, written, digest, by_metadata=by_metadata
        ),
        hashed=bool({"sshs_model_hash", "modelspec.hash_sha256"} & storage.metadata.keys()),
    )


def _rewrites(
    storage: FileStorage, contents: Contents, deltas: Mapping[str, Delta]
) -> tuple[dict[str, tuple[Rewrite, ...]], dict[str, Delta]]:
    """Module → rewrites to magnitudes and to rank 1 at least, and the outlines they result in."""
    if any(delta.gain is not None for delta in deltas.values()):
        require_representable(contents.modules)
    doras = file_dora_rewrites(
        deltas, storage.slot_of, storage.weight, unchanged=contents.unchanged
    )
    usual: tuple[Rewrite, ...] = (_at_least_one,)
    rewrites = {m: (doras[m], *usual) if m in doras else usual for m in deltas}
    return rewrites, {m: _rewritten(delta, rewrites[m]) for m, delta in deltas.items()}


def _add_alphas(
    storage: FileStorage, rewrites: dict[str, tuple[Rewrite, ...]], written: dict[str, Delta]
) -> None:
    """Add the rewrites that give deltas scalings that the file and its readers can express."""
    kept = all(storage.slot_of[module].as_read(delta) for module, delta in written.items())
    steps = [_expressible]
    if not kept and storage.family in _ONE_ALPHA:
        steps.append(_of_one_alpha)
    for step in steps:
        for module, rewrite in step(storage, written).items():
            rewrites[module] = (*rewrites[module], rewrite)
            written[module] = rewrite(written[module])


def _metadata_holds(storage: FileStorage, deltas: Mapping[str, Delta]) -> bool:
    """Whether ranks and alphas in the header still hold, for all modules that it names."""
    return storage.by_metadata and all(
        slot.id in deltas and slot.as_read(deltas[slot.id]) for slot in storage.slots
    )


def _expressible(storage: FileStorage, deltas: Mapping[str, Delta]) -> dict[str, Rewrite]:
    """Module → rewrite that folds its scaling, where the file cannot express it."""
    return {
        module: Delta.folded
        for module, delta in deltas.items()
        if delta.scaling != 1
        and (not storage.slot_of[module].alpha or exact_alpha(delta, torch.float32) is None)
    }


def _of_one_alpha(storage: FileStorage, deltas: Mapping[str, Delta]) -> dict[str, Rewrite]:
    """Module → rewrite to the most frequent alpha, for readers that mix alphas up."""
    return one_alpha({m: d for m, d in deltas.items() if storage.slot_of[m].alpha})


def _strings(
    storage: FileStorage,
    contents: Contents,
    deltas: Mapping[str, Delta],
    digest: str,
    *,
    by_metadata: bool,
) -> dict[str, str]:
    """The strings of the header, for the deltas written and the digest of the data."""
    ranks = [delta.rank for delta in deltas.values()]
    alphas = [delta.scaling * delta.rank for delta in deltas.values()]
    if contents.unchanged and not storage.kinds:
        strings = header_unchanged(storage.metadata, digest)
    else:
        strings = header_of_result(
            storage.metadata, contents.name, contents.provenance, ranks, alphas, digest
        )
    if by_metadata:
        strings[ADAPTER_KEY] = storage.metadata[ADAPTER_KEY]
    elif storage.is_diffusers and len(set(ranks)) > 1:
        strings[ADAPTER_KEY] = _patterns(deltas)
    return strings


def _rewritten(delta: Delta, rewrites: Sequence[Rewrite]) -> Delta:
    """A delta as it is stored."""
    for rewrite in rewrites:
        delta = rewrite(delta)
    return delta


def _tensors(
    slot: FileSlot,
    rewrites: Sequence[Rewrite],
    dtype: torch.dtype | None,
    deltas: Mapping[str, Delta],
) -> dict[str, Tensor]:
    """Key → stored tensor of a module."""
    return slot.write(_rewritten(deltas[slot.id], rewrites), dtype)


def _at_least_one(delta: Delta) -> Delta:
    """A delta of rank 1 at least: no reader accepts rank 0."""
    if delta.rank:
        return delta
    B, A = delta.B.new_zeros(delta.shape[0], 1), delta.A.new_zeros(1, delta.shape[1])
    return dataclasses.replace(delta, B=B, A=A)


def _patterns(deltas: Mapping[str, Delta]) -> str:
    """Diffusers' configuration for modules of different ranks, by component."""
    config: dict[str, dict[str, int]] = {}
    fields: dict[str, Any] = {}
    for module, delta in deltas.items():
        name = parse_module_id(module)
        component = name.prefix.rstrip(".")
        config.setdefault(component, {})[name.path] = delta.rank
        if delta.gain is not None:
            fields[f"{component}.use_dora"] = True
    for component, ranks in config.items():
        # newer transformers have no text_model in CLIP; diffusers handles that in keys only
        usual, others = rank_pattern(ranks, optional="text_model.")
        fields |= {
            f"{component}.r": usual,
            f"{component}.lora_alpha": usual,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": alternation(list(ranks), optional="text_model."),
        }
    return json.dumps(fields, sort_keys=True)
