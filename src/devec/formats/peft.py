"""PEFT adapter directories, in and out."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.adapter import Adapter
from devec.delta import Delta
from devec.errors import (
    DevecWarning,
    FormatError,
    IncompatibleError,
    OutputError,
    UnsupportedError,
    listed,
    located,
)
from devec.formats import card, peft_config
from devec.formats.align import Places, aligned
from devec.formats.conventions import Naming, family_of, naming_of
from devec.formats.peft_config import CONFIG_NAME, Config
from devec.formats.peft_slots import Slot, padded, slot_for
from devec.formats.tensors import (
    read_tensors,
    require_factor,
    require_finite,
    sha256,
    write_tensors,
)
from devec.layout import Layout, ReadOptions
from devec.output import Writer

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED_NAME = "adapter_model.bin"

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?:(?P<embedding>lora_embedding_)|lora_)"
    r"(?P<factor>[AB](?!\.bias)|B)(?P<end>\.weight|\.bias)?"
)


@dataclass(frozen=True)
class PeftLayout:
    """How a PEFT adapter is stored.

    Attributes:
        config: The configuration, as read.
        slots: The stored pairs of factors, in the order of the file.
        base_copies: Weights of the base model that PEFT stores beside adapted embeddings.
        merged_from: Configurations of all the adapters that the slots come from, if they are
            several, so that `config` does not speak for all of them.
    """

    config: Config
    slots: tuple[Slot, ...]
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    merged_from: tuple[Config, ...] = ()

    suffix = ""

    @property
    def naming(self) -> Naming:
        """How the modules are named."""
        naming = naming_of((slot.name for slot in self.slots), None)
        return dataclasses.replace(naming, one_model=True)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""
        types = Counter(slot.dtypes[1] for slot in self.slots)
        return types.most_common(1)[0][0] if types else torch.float32

    def same_names(self, other: object) -> bool:
        """Whether the same module has the same name under another layout."""
        return isinstance(other, PeftLayout)

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters named alike, to be written as PEFT directories.

        Args:
            adapters: The adapters, the first of which this is the layout of.

        Returns:
            The adapters, cut into common pieces if they are named differently.
        """
        return aligned(adapters)

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a module, empty if it is none of a convolution.

        Args:
            module: Name of the module.

        Returns:
            The kernel.

        Raises:
            UnsupportedError: If other conventions have no such layer.
        """
        slot = next(slot for slot in self.slots if module in slot.modules)
        if slot.kind not in ("linear", "conv"):
            raise UnsupportedError(
                f"module {module!r} is stored as {slot.kind}, for which only PEFT has a form"
            )
        return slot.kernel

    def like(self, adapter: Adapter, places: Places) -> PeftLayout:
        """A layout for modules that come from another convention.

        Args:
            adapter: The adapter the modules are of.
            places: Module name → shape (out, in) and kernel.

        Returns:
            The layout.
        """
        return plain_layout(adapter, places, self.config)

    def merged(self, others: Sequence[Layout]) -> PeftLayout:
        """The layout of a combination with other adapters.

        Args:
            others: Layouts of the others.

        Returns:
            This layout with the slots of all.

        Raises:
            IncompatibleError: If an adapter of another format is among them, or layers differ.
        """
        layouts = [self]
        for other in others:
            if not isinstance(other, PeftLayout):
                raise IncompatibleError("adapters of different kinds of files were not aligned")
            layouts.append(other)
        for name in peft_config.POOL_FIELDS:
            peft_config.require_same(name, [layout.config.get(name) for layout in layouts])
        _require_same_parameters(layouts)
        slots: dict[str, Slot] = {}
        copies: dict[str, Tensor] = {}
        for layout in layouts:
            for slot in layout.slots:
                known = slots.setdefault(slot.path, slot)
                if (known.kind, known.kernel, known.experts) != (
                    slot.kind,
                    slot.kernel,
                    slot.experts,
                ):
                    raise IncompatibleError(
                        f"module {slot.name!r} is {known.kind} {known.kernel or ''} in one adapter "
                        f"and {slot.kind} {slot.kernel or ''} in another"
                    )
            for key, tensor in layout.base_copies.items():
                if not torch.equal(copies.setdefault(key, tensor), tensor):
                    raise IncompatibleError(
                        f"the adapters hold different base weights under {key!r}, so they are "
                        "adapters of different base models"
                    )
        configs = tuple(c for layout in layouts for c in layout.merged_from or (layout.config,))
        return dataclasses.replace(
            self,
            slots=tuple(slots.values()),
            base_copies=copies,
            merged_from=configs if others else self.merged_from,
        )

    def carrying(self, other: Layout) -> PeftLayout:
        """This layout for a result that keeps the whole trained tensors of another adapter.

        Args:
            other: The layout of the adapter whose tensors are kept.

        Returns:
            The layout, its configuration naming those tensors.
        """
        config = dict(self.config)
        if isinstance(other, PeftLayout):
            for name in peft_config.CARRIED_FIELDS:
                config[name] = other.config.get(name, peft_config.CARRIED_FIELDS[name])
        return dataclasses.replace(self, config=config)

    def writer(self, adapter: Adapter, dtype: torch.dtype | None) -> Writer:
        """A function that writes an adapter as a PEFT directory.

        Args:
            adapter: The adapter, whose modules are among the slots.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The function, given the path of the directory to make.
        """

        def write(directory: Path) -> None:
            config, tensors = self.stored(adapter, dtype)
            directory.mkdir()
            write_tensors(directory / WEIGHTS_NAME, tensors, {"format": "pt"})
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
            card.write_card(directory, adapter.name, config, adapter.provenance)

        return write

    def stored(
        self, adapter: Adapter, dtype: torch.dtype | None
    ) -> tuple[Config, dict[str, Tensor]]:
        """Configuration and tensors of an adapter, as they go to the files.

        Where every module still has the rank and scaling the input's configuration gives it, that
        configuration holds and is kept. Otherwise scalings are folded into B, alpha = r, and the
        ranks are written as patterns.

        Args:
            adapter: The adapter.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The configuration and key → tensor.

        Raises:
            OutputError: If no module is left.
            IncompatibleError: If a module has no place in the files.
        """
        self._require_places(adapter)
        held = {slot: slot.held(adapter.modules) for slot in self.slots}
        config = peft_config.plain(self.config, carried=bool(adapter.carried))
        with_bias = any(d.bias is not None for deltas in held.values() for d in deltas)
        without = [s.name for s, d in held.items() if d and (s.kind == "embedding" or s.parameters)]
        if with_bias and without:
            raise IncompatibleError(
                f"PEFT cannot hold changes of biases (lora_bias) beside {listed(without)}, which "
                "are embeddings or parameters; leave one kind out"
            )
        if with_bias != config.get("lora_bias", False):
            config["lora_bias"] = with_bias
        if not self._as_read(held):
            left_out = [slot.name for slot, deltas in held.items() if not deltas]
            held = {slot: padded(deltas) for slot, deltas in held.items() if deltas}
            if not held:
                raise OutputError("the adapter changes no module; there is nothing to write")
            config = peft_config.with_ranks(
                config,
                {name: d[0].rank for s, d in held.items() for name in s.parameters or (s.name,)},
                [slot.name for slot in held if not slot.parameters],
                left_out,
                listed=all(map(peft_config.is_plain_list, self.merged_from or (self.config,))),
            )
        tensors: dict[str, Tensor] = {}
        for slot, deltas in held.items():
            dtypes = slot.dtypes if dtype is None else (dtype, dtype)
            with located(f"module {slot.name!r}"):
                tensors |= slot.write(deltas, with_bias=with_bias, dtypes=dtypes)
            copies = (k for k in self.base_copies if k.startswith(f"{slot.path}."))
            tensors |= {key: self.base_copies[key] for key in copies}
        return config, {**tensors, **adapter.carried}

    def _require_places(self, adapter: Adapter) -> None:
        """Refuse modules that the layout has no slot for: they would be lost."""
        shapes = {name: slot.shape for slot in self.slots for name in slot.modules}
        lost = [m for m, delta in adapter.modules.items() if shapes.get(m) != delta.shape]
        if lost:
            raise IncompatibleError(
                f"the layout has no place for the modules {listed(lost)}; it is that of an adapter "
                "without them, or of another base model"
            )

    def _as_read(self, held: Mapping[Slot, Sequence[Delta]]) -> bool:
        """Whether ranks and scalings are still what the configuration says."""
        return not self.merged_from and all(
            deltas and all(d.rank == slot.rank and d.scaling == slot.scaling for d in deltas)
            for slot, deltas in held.items()
        )

    def rebased(self, base: str) -> PeftLayout:
        """The same layout with another base model in its configuration.

        Args:
            base: Identifier or path of the base model.

        Returns:
            The layout.
        """
        config = {**self.config, "base_model_name_or_path": base}
        return dataclasses.replace(self, config=config)

    def describe(self) -> dict[str, Any]:
        """What there is to say of the files, as JSON values."""
        return {
            "format": "peft",
            "family": self._family() or None,
            "base_model": self.config.get("base_model_name_or_path"),
            "task_type": self.config.get("task_type"),
            "peft_version": self.config.get("peft_version"),
            "base_copies": sorted(self.base_copies),
        }

    def _family(self) -> str:
        """The family of the base model."""
        shapes = {slot.name: slot.shape for slot in self.slots}
        return family_of(shapes, str(self.config.get("base_model_name_or_path") or ""))[0]


def plain_layout(adapter: Adapter, places: Places, config: Config | None = None) -> PeftLayout:
    """A layout for modules that come from another convention.

    Args:
        adapter: The adapter the modules are of.
        places: Module name → shape (out, in) and kernel.
        config: The configuration to go by; a new one by default, which gives all modules one rank
            and scaling where the adapter has one.

    Returns:
        The layout.
    """
    layout: Any = adapter.layout
    ranks = {(delta.rank, delta.scaling) for delta in adapter.modules.values()}
    rank, scaling = next(iter(ranks)) if len(ranks) == 1 else (0, 1.0)
    uniform = config is None and rank > 0 and (rank * scaling) / rank == scaling
    new = peft_config.new_config(
        list(places), rank if uniform else 1, rank * scaling if uniform else 1,
        layout.describe().get("base_model"),
    )  # fmt: skip
    slots = tuple(
        Slot(
            path=f"{_PREFIX}{name}",
            name=name,
            kind="conv" if kernel else "linear",
            shape=shape,
            rank=rank if uniform else 0,
            scaling=scaling,
            dtypes=(layout.dtype, layout.dtype),
            kernel=kernel,
        )
        for name, (shape, kernel) in places.items()
    )
    if uniform:
        return PeftLayout(new, slots)
    # the names of others may be endings of names that no adapter has, so none is listed
    named = {**(config or new), "target_modules": new["target_modules"]}
    return PeftLayout(named, slots, merged_from=(named,))


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
    directory = path.parent if path.name in (WEIGHTS_NAME, _PICKLED_NAME) else path
    if not (directory / CONFIG_NAME).is_file():
        return None
    weights = directory / WEIGHTS_NAME
    config = peft_config.read_config(directory)
    if not weights.is_file() and (directory / _PICKLED_NAME).is_file():
        weights = directory / _PICKLED_NAME
    if not weights.is_file():
        raise FormatError(f"{directory} has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    with located(str(weights)):
        tensors = read_tensors(weights, allow_pickle=options.allow_pickle).tensors
        sorted_keys = _sort_keys(config, tensors)
        slots, modules = _slots(config, sorted_keys.factors)
    _warn_of_left_out(weights, sorted_keys.training_only)
    return Adapter(
        name=name,
        modules=modules,
        layout=PeftLayout(config, tuple(slots), sorted_keys.base_copies),
        carried=sorted_keys.carried,
        provenance=card.read_record(directory),
        source=str(directory),
        sha256=sha256(weights),
    )


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
        elif "lora_magnitude_vector" in key:
            raise UnsupportedError(
                f"{key!r} is the magnitude of a DoRA adapter, whose change depends on the base "
                "weights, which are not read yet; PEFT's convert_to_lora can approximate it"
            )
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
    config: Config, factors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[list[Slot], dict[str, Delta]]:
    """The slots of a file and the deltas in them."""
    slots: list[Slot] = []
    modules: dict[str, Delta] = {}
    unexpected = []
    for path, tensors in factors.items():
        name = path.removeprefix(_PREFIX)
        missing = {"A", "B"} - tensors.keys()
        if missing:
            raise FormatError(f"module {name!r} has no factor {missing.pop()}")
        base, nested, _ = name.partition(".base_layer")
        owners = peft_config.owners(config, re.sub(r"(\.base_layer)+$", "", name))
        ranks: dict[tuple[int, float], list[str]] = {}
        for owner in owners or [name]:
            key = peft_config.rank_and_scaling(config, owner)
            ranks.setdefault(key, []).extend([owner] if owners else [])
        with located(f"module {name!r}"):
            slot = slot_for(path, name, tensors, ranks, embedding="embedding" in tensors)
            modules |= slot.read(tensors["A"], tensors["B"], tensors.get("bias"))
        slots.append(slot)
        if not owners and not peft_config.targets(config, base if nested else name):
            unexpected.append(name)
        if nested and not owners:
            _warn_of_attention(name)
    if unexpected:
        raise FormatError(
            f"the file has modules that target_modules of {CONFIG_NAME} does not name, which no "
            f"host would load: {listed(unexpected)}"
        )
    if not slots:
        raise FormatError("the file holds no LoRA factors (lora_A, lora_B)")
    if bool(config.get("lora_bias")) != any("bias" in t for t in factors.values()):
        raise FormatError(
            f"lora_bias is {config.get('lora_bias')} in {CONFIG_NAME}, which the tensors contradict"
        )
    return slots, modules


def _warn_of_left_out(weights: Path, keys: Sequence[str]) -> None:
    """Name the tensors that take no part in the forward pass."""
    if keys:
        warnings.warn(
            f"{weights}: {len(keys)} tensors serve training only and are left out: "
            f"{listed(list(keys))}",
            DevecWarning,
            stacklevel=4,
        )


def _warn_of_attention(name: str) -> None:
    """PEFT's forward pass of nn.MultiheadAttention is not the one its factors say."""
    warnings.warn(
        f"module {name!r} is inside nn.MultiheadAttention, where PEFT applies the change of the "
        "output projection twice; parts add up all the same",
        DevecWarning,
        stacklevel=5,
    )


def _require_same_parameters(layouts: Sequence[PeftLayout]) -> None:
    """Keys of nested parameters mean the same only if the same parameters are targeted."""
    sets = [sorted(layout.config.get("target_parameters") or []) for layout in layouts]
    peft_config.require_same("target_parameters", sets)
    if sets[0]:
        sides = [peft_config.experts_input_side(layout.config) for layout in layouts]
        peft_config.require_same(
            "which axis of an expert is its input (it is the second from PEFT 0.19 on)", sides
        )
