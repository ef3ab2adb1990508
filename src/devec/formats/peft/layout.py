"""How a PEFT adapter directory is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from devec.adapters.adapter import Adapter
from devec.adapters.layout import Layout
from devec.base_model.model import BaseModel, base_model
from devec.deltas.delta import Delta
from devec.deltas.dora import require_representable
from devec.errors import IncompatibleError, UnsupportedError
from devec.formats.alignment.align import aligned
from devec.formats.peft import carried as peft_carried
from devec.formats.peft import config as peft_config
from devec.formats.peft import dora as peft_dora
from devec.formats.peft import written_config as peft_written
from devec.formats.peft.dora import BaseWeights
from devec.formats.peft.slots import Slot, has_biases, padded
from devec.formats.peft.units import (
    held_by,
    merged_copies,
    merged_slots,
    named_ranks,
    ranks_of,
    require_apart,
    units_of,
)
from devec.formats.plan import FilePlan, Piece, Places, require_places, usual_dtype
from devec.formats.rank_patterns import Config
from devec.lazy import joined, outlines, renamed
from devec.naming.conventions import Naming, naming_of
from devec.naming.detection import detect_family
from devec.naming.families import Family

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftLayout:
    """How a PEFT adapter is stored.

    Attributes:
        config: The configuration, as read.
        slots: The stored pairs of factors, in the order of the file.
        base: The base model that was given with the adapter.
        base_copies: Weights of the base model that PEFT stores: embeddings that an adapter is on,
            or of a vocabulary that was resized.
        merged_from: Configurations of all the adapters that the slots come from, if they are
            several, so that `config` does not speak for all of them.
        unlisted: Names of modules that their ``target_modules`` name and that have no slot.
    """

    config: Config
    slots: tuple[Slot, ...]
    base: BaseModel = field(default_factory=lambda: base_model(None))
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    merged_from: tuple[Config, ...] = ()
    unlisted: tuple[str, ...] = ()

    suffix = ""
    joins = False

    @property
    def naming(self) -> Naming:
        """How the modules are named."""
        naming = naming_of((slot.name for slot in self.slots), None)
        return dataclasses.replace(naming, one_model=True)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that most factors are stored in."""
        return usual_dtype(slot.dtypes[1] for slot in self.slots)

    def same_names(self, other: object) -> bool:
        """Whether the same module has the same name under another layout."""
        return isinstance(other, PeftLayout)

    def same_spelling(self, naming: Naming) -> bool:
        """Whether directories are written in a naming as they are."""
        return naming.one_model

    def aligned(self, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters named alike, to be written as PEFT directories.

        Args:
            adapters: The adapters, the first of which this is the layout of.

        Returns:
            The adapters, cut into common pieces if they are named differently.
        """
        return aligned(adapters)

    def stored_type(self, module: str) -> torch.dtype:
        """The type that a module's factors have in the file."""
        return self._slot_of[module].dtypes[1]

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a module, empty if it is none of a convolution.

        Args:
            module: Name of the module.

        Returns:
            The kernel.

        Raises:
            UnsupportedError: If other conventions have no such layer.
        """
        slot = self._slot_of[module]
        if slot.kind not in ("linear", "conv"):
            raise UnsupportedError(
                f"module {module!r} is stored as {slot.kind}, for which only PEFT has a form"
            )
        return slot.kernel

    @cached_property
    def _slot_of(self) -> dict[str, Slot]:
        return {module: slot for slot in self.slots for module in slot.modules}

    def like(self, adapter: Adapter, places: Places, family: str) -> PeftLayout:
        """A layout for modules that come from another convention.

        Args:
            adapter: The adapter the modules are of.
            places: Module name → shape (out, in) and kernel.
            family: Name of the base model's family.

        Returns:
            The layout.
        """
        return plain_layout(adapter, places, family, self.config)

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
        peft_config.require_same_parameters([layout.config for layout in layouts])
        configs = tuple(c for layout in layouts for c in layout.merged_from or (layout.config,))
        return dataclasses.replace(
            self,
            slots=merged_slots([layout.slots for layout in layouts]),
            base=next((o.base for o in layouts if o.base.reference is not None), self.base),
            base_copies=merged_copies([layout.base_copies for layout in layouts]),
            merged_from=configs if others else self.merged_from,
            unlisted=tuple(dict.fromkeys(n for layout in layouts for n in layout.unlisted)),
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
            tasks = [layout.config.get("task_type") for layout in (self, other)]
            if any(task in peft_config.TASKS_WITH_HEADS for task in tasks):
                config["task_type"] = tasks[1]  # the head is that of the tensors
        return dataclasses.replace(self, config=config)

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """Modules on which PEFT can have no LoRA beside whole tensors of this adapter."""
        keys = (key.removeprefix(PREFIX) for key in carried)
        return peft_carried.replaced(self.config, keys, modules)

    def plan(self, adapter: Adapter, dtype: torch.dtype | None) -> FilePlan:
        """What is written of an adapter as a PEFT directory.

        Args:
            adapter: The adapter, whose modules are among the slots.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The plan, from outlines.

        Raises:
            OutputError: If no module is left.
            IncompatibleError: If a module has no place in the files.
        """
        return self._planned(adapter, dtype)[1]

    def stored(
        self, adapter: Adapter, dtype: torch.dtype | None
    ) -> tuple[Config, dict[str, Tensor]]:
        """Configuration and tensors of an adapter, as they go to the files.

        Args:
            adapter: The adapter.
            dtype: Storage type of the factors; by default that of the input.

        Returns:
            The configuration and key → tensor.

        Raises:
            OutputError: If no module is left.
            IncompatibleError: If a module has no place in the files.
        """
        config, plan = self._planned(adapter, dtype)
        return config, plan.tensors()

    def _planned(self, adapter: Adapter, dtype: torch.dtype | None) -> tuple[Config, FilePlan]:
        """The configuration, and what is written."""
        # Where every module still has the rank and scaling the input's configuration gives it, that
        # configuration holds and is kept. Otherwise scalings are folded into B, alpha = r, and the
        # ranks are written as patterns.
        known = {name: delta.outline for name, delta in outlines(adapter.modules).items()}
        require_places({n: slot.shape for slot in self.slots for n in slot.modules}, known)
        dora = any(delta.gain is not None for delta in known.values())
        units = units_of(self.slots, dora=dora)
        held = held_by(units, known)
        config = peft_written.plain(self.config, carried=bool(adapter.carried))
        require_apart(config, held, (key.removeprefix(PREFIX) for key in adapter.carried))
        with_bias = has_biases(held)
        for name, value in {"lora_bias": with_bias, "use_dora": dora}.items():
            if value != bool(config.get(name)):
                config[name] = value
        doras = self._dora_forms(config, held) if dora else {}
        if dora:
            require_representable(adapter.modules)
            held = {slot: [doras[slot](d) for d in deltas] for slot, deltas in held.items()}
        as_read = self._as_read(held)
        ranks = ranks_of(units, held)
        if not as_read:
            held = {slot: padded(deltas, ranks[slot]) for slot, deltas in held.items() if deltas}
            config = peft_written.with_ranks(config, *named_ranks(held))
        if not as_read or self._reaches_further(config):
            config = self._with_targets(config, held)
        pieces = [
            _piece(
                slot,
                doras.get(slot),
                rank=None if as_read else ranks[slot],
                with_bias=with_bias,
                dtype=dtype,
            )
            for slot in held
        ]
        adapted = {slot.path for slot, deltas in held.items() if deltas}
        keys = peft_carried.keys_beside(config, adapter.carried, adapted)
        if config.get("bias", "none") != (bias := peft_carried.bias_field(config, keys.values())):
            config = {**config, "bias": bias}
        missing = {slot.path for slot in self.slots} - adapted
        bases = peft_carried.copies_beside(self.base_copies, adapter.carried, adapted, missing)
        copies = {bases[k]: t for k, t in self.base_copies.items() if k in bases}
        plan = FilePlan(
            modules=adapter.modules,
            pieces=pieces,
            whole=joined(copies, renamed(adapter.carried, keys)),
            strings=lambda _: {"format": "pt"},
            file=WEIGHTS_NAME,
            beside=partial(peft_written.write_beside, adapter.name, config, adapter.provenance),
        )
        return config, plan

    def _dora_forms(
        self, config: Config, held: Mapping[Slot, Sequence[Delta]]
    ) -> dict[Slot, Callable[[Delta], Delta]]:
        """How deltas become DoRAs."""
        weights = BaseWeights(self.base, family(config, self.slots)[1], self.base_copies)
        return peft_dora.dora_forms(config, held, weights)

    def _with_targets(self, config: Config, held: Mapping[Slot, Sequence[Delta]]) -> Config:
        """A configuration that targets the slots that are left, and nothing else."""
        targets = dict.fromkeys(slot.target for slot in held if not slot.parameters)
        missing = [slot.target for slot in self.slots if slot not in held]
        return peft_written.with_targets(
            config,
            list(targets),
            [name for name in (*missing, *self.unlisted) if name not in targets],
            listed=all(map(peft_written.is_plain_list, self.merged_from or (self.config,))),
        )

    def _reaches_further(self, config: Config) -> bool:
        """Whether a configuration that was read targets modules that the result does not have."""
        tied = config.get("ensure_weight_tying") and not config.get("modules_to_save")
        saved = peft_config.is_saved_whole
        return bool(tied) or any(not saved(config, name) for name in self.unlisted)

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
        dora = any(config.get("use_dora") for config in self.merged_from or (self.config,))
        return {
            "format": "peft",
            "family": family(self.config, self.slots)[0] or None,
            "base_model": self.config.get("base_model_name_or_path"),
            "task_type": self.config.get("task_type"),
            "peft_version": self.config.get("peft_version"),
            "base_copies": sorted(self.base_copies),
            "dora": {"out": len(self.slots)} if dora else {},
        }


def _piece(
    slot: Slot,
    dora: Callable[[Delta], Delta] | None,
    *,
    rank: int | None,
    with_bias: bool,
    dtype: torch.dtype | None,
) -> Piece:
    """What is stored of the modules of a slot, brought to a rank if one is given."""

    def tensors(modules: Mapping[str, Delta]) -> dict[str, Tensor]:
        deltas = slot.held(modules, always=True)
        deltas = deltas if dora is None else [dora(delta) for delta in deltas]
        deltas = deltas if rank is None else padded(deltas, rank)
        return slot.write(deltas, with_bias=with_bias, dtype=dtype)

    return Piece(slot.name, tuple(slot.modules), tensors)


def family(config: Config, slots: Sequence[Slot]) -> tuple[str, Family | None]:
    """The family of the base model: its name, empty if unknown, and its tables, if there are any.

    Args:
        config: The configuration.
        slots: The slots.

    Returns:
        Name and tables.
    """
    shapes = {slot.name: slot.shape for slot in slots}
    return detect_family(shapes, str(config.get("base_model_name_or_path") or ""))


def plain_layout(
    adapter: Adapter,
    places: Places,
    family: str,  # noqa: ARG001  # which PEFT has no word for
    config: Config | None = None,
) -> PeftLayout:
    """A layout for modules that come from another convention.

    Args:
        adapter: The adapter the modules are of.
        places: Module name → shape (out, in) and kernel.
        family: Name of the base model's family.
        config: The configuration to go by; a new one by default, which gives all modules one rank
            and scaling where the adapter has one.

    Returns:
        The layout.
    """
    layout: Any = adapter.layout
    ranks = {(delta.rank, delta.scaling) for delta in outlines(adapter.modules).values()}
    rank, scaling = next(iter(ranks)) if len(ranks) == 1 else (0, 1.0)
    uniform = config is None and rank > 0 and (rank * scaling) / rank == scaling
    new = peft_written.new_config(
        list(places), rank if uniform else 1, rank * scaling if uniform else 1,
        layout.describe().get("base_model"),
    )  # fmt: skip
    slots = tuple(
        Slot(
            path=f"{PREFIX}{name}",
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
        return PeftLayout(new, slots, layout.base)
    # the names of others may be endings of names that no adapter has, so none is listed
    named = {**(config or new), "target_modules": new["target_modules"]}
    return PeftLayout(named, slots, layout.base, merged_from=(named,))
