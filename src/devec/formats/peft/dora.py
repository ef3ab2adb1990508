"""DoRA as PEFT stores it: magnitudes of the outputs, in every module of an adapter or in none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from devec.base_model.model import BaseModel
from devec.deltas.base_weight import BaseWeight, InMemoryWeight
from devec.deltas.delta import Delta
from devec.deltas.dora import as_magnitudes
from devec.errors import FormatError, UnsupportedError, listed, located
from devec.formats.magnitudes import axes_of, of_outputs_only
from devec.formats.peft import config as peft_config
from devec.formats.peft.config import CONFIG_NAME
from devec.formats.peft.slots import Slot
from devec.formats.rank_patterns import Config
from devec.naming.families import Family

# PEFT itself writes no ending, except once more with one beside an embedding that it saves whole.
_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")


def owner(key: str) -> str:
    """The path of the module whose magnitudes a key holds, empty for other keys."""
    match = _KEY.fullmatch(key)
    return match["path"] if match else ""


def require_same_magnitudes(path: str, known: Tensor, key: str, tensor: Tensor) -> None:
    """Check that magnitudes which a file holds twice are the same.

    Args:
        path: Path of the module.
        known: The magnitudes.
        key: Key of the others.
        tensor: The others.

    Raises:
        FormatError: If they are not.
    """
    if known.shape != tensor.shape or not torch.equal(known.double(), tensor.double()):
        raise FormatError(f"{key!r} is not the same as the other magnitudes of {path!r}")


def require_everywhere(config: Config, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that all modules have magnitudes if the configuration says so, and none else.

    Args:
        config: The configuration.
        factors: Name of a module → its tensors.

    Raises:
        FormatError: If it is otherwise.
    """
    said = bool(config.get("use_dora"))
    other = [name for name, tensors in factors.items() if ("magnitude" in tensors) != said]
    if other and said:
        raise FormatError(
            f"use_dora is true in {CONFIG_NAME}, but {len(other)} of {len(factors)} modules have "
            f"no magnitudes (lora_magnitude_vector): {listed(other)}"
        )
    if other:
        raise FormatError(
            f"use_dora is not true in {CONFIG_NAME}, but the file has magnitudes "
            f"(lora_magnitude_vector) of {listed(other)}; which of the two is wrong cannot be told"
        )


@dataclass(frozen=True)
class BaseWeights:
    """Where the base weights of slots are.

    Attributes:
        model: The base model.
        family: The names of its modules, where they are known.
        copies: Weights of the base model that are stored beside the adapter. They come first, as
            PEFT loads them into the model: the vocabulary may have grown in training.
    """

    model: BaseModel
    family: Family | None
    copies: Mapping[str, Tensor]

    def of(self, slot: Slot) -> BaseWeight:
        """The base weight of a slot as the map from inputs to outputs, not yet read."""
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
        return InMemoryWeight(W, known.source) if W.shape == slot.shape else known


def dora_forms(
    config: Config, held: Mapping[Slot, Sequence[Delta]], weights: BaseWeights
) -> dict[Slot, Callable[[Delta], Delta]]:
    """How deltas of an adapter some of whose modules are DoRAs all become DoRAs, as PEFT wants it.

    Args:
        config: The configuration they are written with.
        held: Slot → its deltas, or their outlines, of which there may be none.
        weights: The base weights, read for modules that are plain LoRAs.

    Returns:
        Slot → from its delta to that with magnitudes of the outputs, exact to rounding.

    Raises:
        UnsupportedError: If PEFT has no DoRA of this kind.
    """
    present = {slot: delta for slot, deltas in held.items() for delta in deltas[:1]}
    _require_kinds(present)
    peft_config.require_dora_fits(config, "the configuration to write")
    return {slot: partial(_as_dora, slot, weights.of(slot)) for slot in present}


def _as_dora(slot: Slot, base: BaseWeight, delta: Delta) -> Delta:
    """A delta with magnitudes."""
    what = f"module {slot.name!r}"
    if delta.gain is None:
        what += " (a LoRA that is to be written as a DoRA, as other modules are DoRAs)"
    with located(what):
        return as_magnitudes(delta, "out", base)


def _require_kinds(present: Mapping[Slot, Delta]) -> None:
    """Refuse what a DoRA of PEFT cannot hold."""
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
    turned = [slot.name for slot, delta in present.items() if axes_of(delta) == {"in"}]
    if turned:
        raise UnsupportedError(f"module {turned[0]!r}: {of_outputs_only()}")
