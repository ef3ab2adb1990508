"""Reading PEFT adapter directories."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.adapter import Adapter
from devec.delta import Delta
from devec.errors import DevecWarning, FormatError, UnsupportedError, listed, located
from devec.formats import card, peft_config, peft_dora
from devec.formats.base_model import base_model
from devec.formats.magnitudes import warn_of_signs
from devec.formats.peft_config import CONFIG_NAME, Config
from devec.formats.peft_dora import BaseWeights
from devec.formats.peft_layout import PREFIX, WEIGHTS_NAME, PeftLayout, family
from devec.formats.peft_slots import Slot, slot_for
from devec.formats.tensors import read_tensors, require_factor, require_finite
from devec.layout import ReadOptions
from devec.lazy import Lazy, mapped, only, outlines

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
        file = read_tensors(weights, allow_pickle=options.allow_pickle)
    adapter = parsed(config, file.tensors, name, options, str(weights))
    return dataclasses.replace(
        adapter,
        provenance=card.read_record(directory),
        source=str(directory),
        sha256=file.sha256,
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
        for path, kept, key in keys.repeated:
            peft_dora.require_same_magnitudes(path, tensors[kept], key, tensors[key])
        copies = {key: require_finite(key, tensors[key]) for key in keys.base_copies}
        carried = mapped(only(tensors, keys.carried), require_finite)
        base = base_model(options.base, str(config.get("base_model_name_or_path") or ""))
        slots = _slots(config, keys, outlines(tensors))
        weights = BaseWeights(base, family(config, slots)[1], copies)
        modules = _Stored(tensors, keys, slots, weights, where).modules()
        warn_of_signs(where, keys.magnitudes(tensors))
    _warn_of_left_out(where, keys.training_only)
    layout = PeftLayout(config, tuple(slots), base, copies)
    return Adapter(name, modules, layout, carried, source=where)


class _Stored:
    """The modules of a file.

    The parameter of many experts is one pair of tensors: the pair last read is remembered.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        keys: _SortedKeys,
        slots: Sequence[Slot],
        weights: BaseWeights,
        where: str,
    ) -> None:
        self._tensors, self._keys = tensors, keys
        self._slots, self._weights, self._where = slots, weights, where
        self._slot_of = {module: slot for slot in slots for module in slot.modules}
        self._last: tuple[Slot, Mapping[str, Delta]] | None = None

    def modules(self) -> Mapping[str, Delta]:
        """Module → delta, read when it is asked for if the tensors are."""
        known: dict[str, Delta] = {}
        for slot in self._slots:
            known |= self._read(slot, outlines(self._tensors))
        return Lazy(known, self._delta) if isinstance(self._tensors, Lazy) else known

    def _delta(self, module: str) -> Delta:
        slot, last = self._slot_of[module], self._last
        if last is not None and last[0] is slot:
            return last[1][module]
        with located(self._where):
            found = self._read(slot, self._tensors)
        if len(found) > 1:
            self._last = (slot, found)
        return found[module]

    def _read(self, slot: Slot, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
        """The deltas of a slot from tensors, or their outlines from those."""
        with located(f"module {slot.name!r}"):
            factors = {
                part: require_factor(key, tensors[key])
                for part, key in self._keys.factors[slot.path].items()
            }
            return slot.read(factors, self._weights.of(slot))


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
    """The keys of a file by what they are.

    Attributes:
        factors: Path of a module → part → key.
        embeddings: Paths of the modules that are embeddings.
        repeated: Keys of magnitudes that stand in a file twice: path, first and further key.
        base_copies: Keys of weights of the base model.
        carried: Keys of whole trained tensors.
        training_only: Keys of what takes no part in the forward pass.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    repeated: list[tuple[str, str, str]] = field(default_factory=list)
    base_copies: list[str] = field(default_factory=list)
    carried: dict[str, None] = field(default_factory=dict)
    training_only: list[str] = field(default_factory=list)

    def magnitudes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The modules that have magnitudes, with them."""
        for path, factors in self.factors.items():
            if "magnitude" in factors:
                yield path.removeprefix(PREFIX), tensors[factors["magnitude"]]


def _sort_keys(config: Config, keys: Iterable[str]) -> _SortedKeys:
    """Account for every key of a file, by its name alone."""
    trained = (".base_layer.bias",) if config.get("bias", "none") != "none" else ()
    result = _SortedKeys()
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match:
            part = "bias" if match["end"] == ".bias" else match["factor"]
            result.factors.setdefault(match["path"], {})[part] = key
            if match["embedding"]:
                result.embeddings.add(match["path"])
        elif any(mark in key for mark in peft_config.TRAINING_ONLY_TENSORS):
            result.training_only.append(key)
        elif path := peft_dora.owner(key):
            known = result.factors.setdefault(path, {}).setdefault("magnitude", key)
            if known != key:
                result.repeated.append((path, known, key))
        elif ".lora_" in key:
            raise UnsupportedError(f"{key!r} belongs to no kind of LoRA layer that is known")
        elif ".base_layer." in key and not key.endswith(trained):
            result.base_copies.append(key)
        else:
            result.carried[key] = None
    lone = [k for k in result.base_copies if k.split(".base_layer.")[0] not in result.factors]
    result.base_copies = [key for key in result.base_copies if key not in lone]
    result.carried |= dict.fromkeys(lone)
    return result


def _slots(config: Config, keys: _SortedKeys, known: Mapping[str, Tensor]) -> list[Slot]:
    """The slots of a file, by the shapes of its tensors."""
    slots: list[Slot] = []
    factors = {path: {p: known[k] for p, k in held.items()} for path, held in keys.factors.items()}
    for path, tensors in factors.items():
        name = path.removeprefix(PREFIX)
        missing = {"A", "B"} - tensors.keys()
        if missing:
            raise FormatError(f"module {name!r} has no factor {missing.pop()}")
        with located(f"module {name!r}"):
            slots.append(_slot(config, path, tensors, embedding=path in keys.embeddings))
        if slots[-1].name != slots[-1].base_name and not slots[-1].parameters:
            _warn_of_attention(name)
    if not slots:
        raise FormatError("the file holds no LoRA factors (lora_A, lora_B)")
    _require_as_said(config, slots, factors)
    return slots


def _slot(config: Config, path: str, tensors: Mapping[str, Tensor], *, embedding: bool) -> Slot:
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
        embedding=embedding,
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
