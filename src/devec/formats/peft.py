"""Reading PEFT adapter directories."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.adapter import Adapter
from devec.delta import Delta
from devec.errors import DevecWarning, FormatError, UnsupportedError, listed, located
from devec.formats import card, peft_config, peft_dora
from devec.formats.base_model import BaseModel, base_model
from devec.formats.magnitudes import warn_of_signs
from devec.formats.peft_config import CONFIG_NAME, Config
from devec.formats.peft_dora import BaseWeights
from devec.formats.peft_layout import PREFIX, WEIGHTS_NAME, PeftLayout, family
from devec.formats.peft_slots import Slot, slot_for
from devec.formats.tensors import read_tensors, require_factor, require_finite, sha256
from devec.layout import ReadOptions

_PICKLED_NAME = "adapter_model.bin"

_FACTOR = re.compile(
    r"(?P<path>.+)\.(?:(?P<embedding>lora_embedding_)|lora_)"
    r"(?P<factor>[AB](?!\.bias)|B)(?P<end>\.weight|\.bias)?"
)


def read(path: Path, name: str, options: ReadOptions) -> Adapter | None:
    """Read a PEFT adapter directory.

    Args:
        path: The directory, or the weights file in it.
        name: What to call the adapter.
        options: How to read it.

    Returns:
        The adapter, or None if the path is no PEFT adapter directory.

    Raises:
        FormatError: If files are missing, unreadable or contradict each other.
        UnsupportedError: If the adapter is not a plain low-rank delta.
    """
    weights = _weights(path)
    if weights is None:
        return None
    directory = weights.parent
    config = peft_config.read_config(directory)
    if not weights.is_file():
        raise FormatError(f"{directory} has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    with located(str(weights)):
        tensors = read_tensors(weights, allow_pickle=options.allow_pickle).tensors
    adapter = parsed(config, tensors, name, options, str(weights))
    return dataclasses.replace(
        adapter,
        provenance=card.read_record(directory),
        source=str(directory),
        sha256=sha256(weights),
    )


def parsed(
    config: Config, tensors: Mapping[str, Tensor], name: str, options: ReadOptions, where: str
) -> Adapter:
    """The adapter that a configuration and tensors of PEFT are.

    Args:
        config: The configuration, checked.
        tensors: Key → tensor, as PEFT stores them.
        name: What to call the adapter.
        options: How to read it.
        where: Where they come from, for messages.

    Returns:
        The adapter.

    Raises:
        FormatError: If they contradict each other.
        UnsupportedError: If the adapter is not a plain low-rank delta.
    """
    with located(where):
        keys = _sort_keys(config, tensors)
        base = base_model(options.base, str(config.get("base_model_name_or_path") or ""))
        slots, modules = _slots(config, keys, base)
    warn_of_signs(where, modules)
    _warn_of_left_out(where, keys.training_only)
    layout = PeftLayout(config, tuple(slots), base, keys.base_copies)
    return Adapter(name, modules, layout, keys.carried, source=where)


def _weights(path: Path) -> Path | None:
    """The file of weights that a configuration of PEFT belongs to, None if there is none."""
    directory = path if path.is_dir() else path.parent
    if not (directory / CONFIG_NAME).is_file():
        return None
    if path.is_file() and path.name not in (WEIGHTS_NAME, _PICKLED_NAME, CONFIG_NAME):
        return path if _has_peft_keys(path) else None
    pickled = directory / _PICKLED_NAME
    return (
        pickled
        if pickled.is_file() and not (directory / WEIGHTS_NAME).is_file()
        else (directory / WEIGHTS_NAME)
    )


def _has_peft_keys(path: Path) -> bool:
    """Whether the keys of a file are PEFT's, so that the configuration beside it is its own."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


@dataclass
class _SortedKeys:
    """The tensors of a file by what they are."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    training_only: list[str] = field(default_factory=list)


def _sort_keys(config: Config, tensors: Mapping[str, Tensor]) -> _SortedKeys:
    """Account for every key of a file, by its name alone."""
    trained = (".base_layer.bias",) if config.get("bias", "none") != "none" else ()
    result = _SortedKeys()
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match:
            part = "bias" if match["end"] == ".bias" else match["factor"]
            factors = result.factors.setdefault(match["path"], {})
            factors[part] = require_factor(key, tensor)
            if match["embedding"]:
                factors["embedding"] = tensor
        elif any(mark in key for mark in peft_config.TRAINING_ONLY_TENSORS):
            result.training_only.append(key)
        elif path := peft_dora.owner(key):
            factors = result.factors.setdefault(path, {})
            peft_dora.add_magnitude(factors, key, require_factor(key, tensor))
        elif ".lora_" in key:
            raise UnsupportedError(f"{key!r} belongs to no kind of LoRA layer that is known")
        elif ".base_layer." in key and not key.endswith(trained):
            result.base_copies[key] = require_finite(key, tensor)
        else:
            result.carried[key] = require_finite(key, tensor)
    for key in [k for k in result.base_copies if k.split(".base_layer.")[0] not in result.factors]:
        result.carried[key] = result.base_copies.pop(key)
    return result


def _slots(
    config: Config, keys: _SortedKeys, base: BaseModel
) -> tuple[list[Slot], dict[str, Delta]]:
    """The slots of a file and the deltas in them."""
    slots: list[Slot] = []
    for path, tensors in keys.factors.items():
        name = path.removeprefix(PREFIX)
        missing = {"A", "B"} - tensors.keys()
        if missing:
            raise FormatError(f"module {name!r} has no factor {missing.pop()}")
        with located(f"module {name!r}"):
            slots.append(_slot(config, path, tensors))
        if slots[-1].name != slots[-1].base_name and not slots[-1].parameters:
            _warn_of_attention(name)
    if not slots:
        raise FormatError("the file holds no LoRA factors (lora_A, lora_B)")
    _require_as_said(config, slots, keys.factors)
    weights = BaseWeights(base, family(config, slots)[1], keys.base_copies)
    modules: dict[str, Delta] = {}
    for slot in slots:
        with located(f"module {slot.name!r}"):
            modules |= slot.read(keys.factors[slot.path], weights.of(slot))
    return slots, modules


def _slot(config: Config, path: str, tensors: Mapping[str, Tensor]) -> Slot:
    """The slot of a pair of factors."""
    name = path.removeprefix(PREFIX)
    owners = peft_config.owners(config, re.sub(r"(\.base_layer)+$", "", name))
    ranks: dict[tuple[int, float], list[str]] = {}
    for owner in owners or [name]:
        key = peft_config.rank_and_scaling(config, owner)
        ranks.setdefault(key, []).extend([owner] if owners else [])
    return slot_for(
        path,
        name,
        tensors,
        ranks,
        embedding="embedding" in tensors,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _require_as_said(
    config: Config, slots: Sequence[Slot], factors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Check that modules and their tensors are those that the configuration speaks of."""
    unexpected = [
        slot.name
        for slot in slots
        if not slot.parameters
        and not peft_config.targets(config, slot.name.partition(".base_layer")[0])
    ]
    if unexpected:
        raise FormatError(
            f"the file has modules that target_modules of {CONFIG_NAME} does not name, which no "
            f"host would load: {listed(unexpected)}"
        )
    if bool(config.get("lora_bias")) != any("bias" in t for t in factors.values()):
        raise FormatError(
            f"lora_bias is {config.get('lora_bias')} in {CONFIG_NAME}, which the tensors contradict"
        )
    peft_dora.require_everywhere(
        config, {path.removeprefix(PREFIX): tensors for path, tensors in factors.items()}
    )


def _warn_of_left_out(where: str, keys: Sequence[str]) -> None:
    """Name the tensors that take no part in the forward pass."""
    if keys:
        warnings.warn(
            f"{where}: {len(keys)} tensors serve training only and are left out: "
            f"{listed(list(keys))}",
            DevecWarning,
            stacklevel=5,
        )


def _warn_of_attention(name: str) -> None:
    """PEFT's forward pass of nn.MultiheadAttention is not the one its factors say."""
    warnings.warn(
        f"module {name!r} is inside nn.MultiheadAttention, where PEFT applies the change of the "
        "output projection twice; parts add up all the same",
        DevecWarning,
        stacklevel=6,
    )
