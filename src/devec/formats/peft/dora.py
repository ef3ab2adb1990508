"""DoRA in PEFT: magnitudes of outputs, in every module of an adapter or in none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from devec.base_model.model import BaseModel
from devec.deltas.base_weight import BaseWeight, HeldWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import axes_of
from devec.errors import FormatError, UnsupportedError, listed
from devec.formats.magnitudes import of_outputs_only
from devec.formats.peft.config import CONFIG_NAME, require_dora_fits
from devec.formats.peft.slots import PeftSlot
from devec.formats.rank_patterns import Config
from devec.formats.rewrites import Rewrite, as_stored_dora
from devec.naming.families import Family

# PEFT writes no suffix, except a second suffix beside an embedding that it saves whole.
_MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")


def magnitude_owner(key: str) -> str:
    """The path of the module whose magnitudes a key stores; empty for other keys."""
    match = _MAGNITUDE_KEY.fullmatch(key)
    return match["path"] if match else ""


def require_same_magnitudes(path: str, known: Tensor, key: str, tensor: Tensor) -> None:
    """Refuse magnitudes of a module that are stored twice and differ."""
    if known.shape != tensor.shape or not torch.equal(known.double(), tensor.double()):
        raise FormatError(f"{key!r} is not the same as the other magnitudes of {path!r}")


def require_everywhere(config: Config, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that all modules have magnitudes if the configuration says so, and else none."""
    declared = bool(config.get("use_dora"))
    other = [name for name, tensors in factors.items() if ("magnitude" in tensors) != declared]
    if other and declared:
        raise FormatError(
            f"use_dora is true in {CONFIG_NAME}, but {len(other)} of {len(factors)} modules have "
            f"no magnitudes (lora_magnitude_vector): {listed(other)}"
        )
    if other:
        raise FormatError(
            f"use_dora is not true in {CONFIG_NAME}, but the file has magnitudes "
            f"(lora_magnitude_vector) of {listed(other)}; which of the two is wrong cannot be "
            "determined"
        )


@dataclass(frozen=True)
class BaseWeights:
    """The base weights of slots.

    Attributes:
        model: The base model.
        family: The names of its modules, if its family is known.
        copies: Base weights stored beside the adapter. They take precedence, as PEFT loads them
            into the model: the vocabulary may have been resized in training.
    """

    model: BaseModel
    family: Family | None
    copies: Mapping[str, Tensor]

    def of(self, slot: PeftSlot) -> BaseWeight:
        """The base weight of a slot, shape (out, in), not yet read."""
        is_linear, is_embedding = slot.kind == "linear", slot.kind == "embedding"
        known = self.model.weight(
            slot.base_name,
            slot.shape,
            family=self.family,
            transposed=None if is_linear else is_embedding,
            fan_in_fan_out=slot.fan_in_fan_out,
        )
        copy = self.copies.get(f"{slot.path}.base_layer.weight")
        if copy is None or copy.ndim != 2:
            return known
        W = copy.mT if is_embedding else copy
        return HeldWeight(W, known.source) if W.shape == slot.shape else known


def peft_dora_rewrites(
    config: Config, deltas: Mapping[PeftSlot, Sequence[Delta]], weights: BaseWeights
) -> dict[PeftSlot, Rewrite]:
    """How to rewrite the deltas of an adapter with DoRAs: PEFT requires that all are DoRAs.

    Args:
        config: The configuration to write.
        deltas: Slot → its deltas or their outlines, possibly none.
        weights: The base weights, read for modules that are plain LoRAs.

    Returns:
        Slot → rewrite that adds magnitudes of outputs, exact to rounding.

    Raises:
        UnsupportedError: If PEFT has no DoRA of this kind.
    """
    present = {slot: own[0] for slot, own in deltas.items() if own}
    _require_dora_kinds(present)
    require_dora_fits(config, "the configuration to write")
    return {slot: partial(_as_peft_dora, slot, weights.of(slot)) for slot in present}


def _as_peft_dora(slot: PeftSlot, base: BaseWeight, delta: Delta) -> Delta:
    """A delta with magnitudes of outputs."""
    return as_stored_dora(slot.name, delta, "out", base)


def _require_dora_kinds(present: Mapping[PeftSlot, Delta]) -> None:
    """Refuse deltas that PEFT cannot store as DoRAs."""
    biased = [slot.name for slot, delta in present.items() if delta.bias is not None]
    if biased:
        raise UnsupportedError(
            f"the change of the bias of {listed(biased)} cannot be written: PEFT supports no "
            "lora_bias beside use_dora, and other modules are DoRAs"
        )
    layers = [slot.name for slot in present if slot.parameters or slot.attention]
    if layers:
        raise UnsupportedError(
            f"PEFT supports no DoRA of {listed(layers)}, which are parameters or inside "
            "nn.MultiheadAttention, and one DoRA makes all modules of an adapter DoRAs; leave one "
            "kind out"
        )
    of_inputs = [slot.name for slot, delta in present.items() if axes_of(delta) == {"in"}]
    if of_inputs:
        raise UnsupportedError(f"module {of_inputs[0]!r}: {of_outputs_only()}")
