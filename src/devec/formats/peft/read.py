"""Reading PEFT adapter directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.layout import ReadOptions
from devec.base_model.model import base_model
from devec.deltas.delta import Delta
from devec.errors import FormatError, listed, located, warn
from devec.files.safetensors_reader import read_tensors, require_factor, require_finite
from devec.formats.card import read_record_beside
from devec.formats.magnitudes import warn_of_signs
from devec.formats.peft.config import CONFIG_NAME, read_config
from devec.formats.peft.dora import BaseWeights, require_same_magnitudes
from devec.formats.peft.layout import PeftLayout
from devec.formats.peft.names import PREFIX
from devec.formats.peft.reading.file_slots import slots_of, unlisted_targets
from devec.formats.peft.reading.keys import PeftKeys, sort_peft_keys
from devec.formats.peft.slots import PeftSlot
from devec.formats.peft.storage import WEIGHTS_NAME, recorded_family
from devec.formats.rank_patterns import Config
from devec.lazy import LazyMapping, mapped, outlines, selected

_PICKLED_NAME = "adapter_model.bin"
_UNUSED = (
    "belong to a second adapter of an output projection of nn.MultiheadAttention, which PEFT's "
    "forward pass never uses,"
)


def read_peft(path: Path, name: str, options: ReadOptions) -> Adapter | None:
    """Read a PEFT adapter directory.

    Args:
        path: The directory, or the weights file in it.
        name: Name of the adapter.
        options: How to read it.

    Returns:
        The adapter; None if the path is no PEFT adapter directory.

    Raises:
        FormatError: If files are missing, unreadable or contradict each other.
        UnsupportedError: If the adapter is not a plain low-rank delta.
    """
    weights = _weights(path)
    if weights is None:
        return None
    directory = weights.parent
    config = read_config(directory)
    if not weights.is_file():
        raise FormatError(f"{directory} has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    with located(str(weights)):
        file = read_tensors(weights, allow_pickle=options.allow_pickle)
    adapter = parse_peft(config, file.tensors, name, options, str(weights))
    return dataclasses.replace(
        adapter,
        provenance=read_record_beside(directory),
        source=str(directory),
        sha256=file.sha256,
    )


def parse_peft(
    config: Config, tensors: Mapping[str, Tensor], name: str, options: ReadOptions, where: str
) -> Adapter:
    """The adapter from its configuration and tensors.

    Args:
        config: The configuration, checked.
        tensors: Key → tensor, as PEFT stores them.
        name: Name of the adapter.
        options: How to read it.
        where: Their origin, for messages.

    Returns:
        The adapter.

    Raises:
        FormatError: If configuration and tensors contradict each other.
        UnsupportedError: If the adapter is not a plain low-rank delta.
    """
    with located(where):
        keys = sort_peft_keys(config, tensors)
        for path, kept, key in keys.repeated:
            require_same_magnitudes(path, tensors[kept], key, tensors[key])
        copies = {key: require_finite(key, tensors[key]) for key in keys.base_copies}
        carried = mapped(selected(tensors, keys.carried), require_finite)
        base = base_model(options.base, str(config.get("base_model_name_or_path") or ""))
        slots = slots_of(config, keys, outlines(tensors))
        weights = BaseWeights(base, recorded_family(config, slots)[1], copies)
        modules = _PeftModules(tensors, keys, slots, weights, where).modules()
        warn_of_signs(where, keys.magnitudes(tensors))
    _warn_of_left_out(where, "serve training only", keys.training_only)
    _warn_of_left_out(where, _UNUSED, keys.unused)
    layout = PeftLayout(
        config, tuple(slots), base, copies, unlisted=unlisted_targets(config, keys, slots)
    )
    return Adapter(name, modules, layout, carried, source=where)


class _PeftModules:
    """Reads the modules of a file.

    The parameter of many experts is one pair of tensors; the last pair is cached.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        keys: PeftKeys,
        slots: Sequence[PeftSlot],
        weights: BaseWeights,
        where: str,
    ) -> None:
        self._tensors, self._keys = tensors, keys
        self._slots, self._weights, self._where = slots, weights, where
        self._slot_of = {module: slot for slot in slots for module in slot.modules}
        self._last: tuple[PeftSlot, Mapping[str, Delta]] | None = None

    def modules(self) -> Mapping[str, Delta]:
        """Module → delta; lazy if the tensors are."""
        deltas: dict[str, Delta] = {}
        for slot in self._slots:
            deltas |= self._read(slot, outlines(self._tensors))
        return (
            LazyMapping(deltas, self._delta) if isinstance(self._tensors, LazyMapping) else deltas
        )

    def _delta(self, module: str) -> Delta:
        slot, last = self._slot_of[module], self._last
        if last is not None and last[0] is slot:
            return last[1][module]
        with located(self._where):
            deltas = self._read(slot, self._tensors)
        if len(deltas) > 1:
            self._last = (slot, deltas)
        return deltas[module]

    def _read(self, slot: PeftSlot, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
        """The deltas of a slot from tensors, or their outlines from outlines."""
        with located(f"module {slot.name!r}"):
            factors = {
                part: require_factor(key, tensors[key])
                for part, key in self._keys.factors[slot.path].items()
            }
            return slot.read(factors, self._weights.of(slot))


def _weights(path: Path) -> Path | None:
    """The weights file that belongs to a PEFT configuration; None if there is none."""
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
    """Whether a file has PEFT's keys, so that the configuration beside it belongs to it."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _warn_of_left_out(where: str, why: str, keys: Sequence[str]) -> None:
    """Warn of tensors that take no part in the forward pass."""
    if keys:
        warn(f"{where}: {len(keys)} tensors {why} and are left out: {listed(list(keys))}")
