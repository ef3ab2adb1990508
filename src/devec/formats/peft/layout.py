"""The layout of PEFT adapter directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from devec.adapters.layout import About, Contents, Layout, ModuleNames, ModuleShapes
from devec.deltas.delta import Delta
from devec.errors import UnsupportedError
from devec.formats.merging import all_of_class, first_base, usual_dtype
from devec.formats.peft.carried import replaced
from devec.formats.peft.config import (
    CARRIED_FIELDS,
    POOL_FIELDS,
    TASKS_WITH_HEADS,
    require_agreement,
    require_same_parameters,
)
from devec.formats.peft.names import PREFIX
from devec.formats.peft.planning import planned
from devec.formats.peft.slots import PeftSlot
from devec.formats.peft.storage import PeftStorage, recorded_family
from devec.formats.peft.units import merged_copies, merged_slots
from devec.formats.peft.written_config import new_config
from devec.formats.plan import FilePlan
from devec.formats.rank_patterns import Config
from devec.lazy import outlines
from devec.naming.conventions import naming_of


class PeftLayout(PeftStorage):
    """How a PEFT adapter is stored; the attributes are those of `PeftStorage`."""

    suffix = ""
    joins = False

    @cached_property
    def names(self) -> ModuleNames:
        """Names of modules: those of the base model."""
        naming = naming_of((slot.name for slot in self.slots), None)
        return ModuleNames(
            dataclasses.replace(naming, one_model=True),
            recorded_family(self.config, self.slots)[0],
            verbatim=True,
        )

    @property
    def about(self) -> About:
        """What the configuration says about the adapter."""
        dora = any(config.get("use_dora") for config in self.merged_from or (self.config,))
        return About(
            format="peft",
            family=self.names.family or None,
            base_model=self.config.get("base_model_name_or_path"),
            task_type=self.config.get("task_type"),
            peft_version=self.config.get("peft_version"),
            base_copies=tuple(sorted(self.base_copies)),
            dora={"out": len(self.slots)} if dora else {},
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The most frequent storage type of the factors."""
        return usual_dtype(slot.dtypes[1] for slot in self.slots)

    @cached_property
    def _slot_of(self) -> dict[str, PeftSlot]:
        return {module: slot for slot in self.slots for module in slot.modules}

    def stored_type(self, module: str) -> torch.dtype:
        """The storage type of a module's factors."""
        return self._slot_of[module].dtypes[1]

    def kernel(self, module: str) -> tuple[int, ...]:
        """Shape of a convolution's kernel; layers that only PEFT can store are refused."""
        slot = self._slot_of[module]
        if slot.kind not in ("linear", "conv"):
            raise UnsupportedError(
                f"module {module!r} is stored as {slot.kind}, which only PEFT can store"
            )
        return slot.kernel

    def like(
        self, other: Layout, modules: Mapping[str, Delta], shapes: ModuleShapes, family: str
    ) -> PeftLayout:
        """A layout with this configuration for an adapter with another layout."""
        return peft_layout_for(other, modules, shapes, family, self.config)

    def merged(self, others: Sequence[Layout]) -> PeftLayout:
        """The layout of a combination with other adapters: this one with the slots of all."""
        layouts = [self, *all_of_class(others, PeftLayout)]
        for name in POOL_FIELDS:
            require_agreement(name, [layout.config.get(name) for layout in layouts])
        require_same_parameters([layout.config for layout in layouts])
        configs = tuple(c for layout in layouts for c in layout.merged_from or (layout.config,))
        return dataclasses.replace(
            self,
            slots=merged_slots([layout.slots for layout in layouts]),
            base=first_base(layouts),
            base_copies=merged_copies([layout.base_copies for layout in layouts]),
            merged_from=configs if others else self.merged_from,
            unlisted=tuple(dict.fromkeys(n for layout in layouts for n in layout.unlisted)),
        )

    def carrying(self, other: Layout) -> PeftLayout:
        """This layout, with a configuration that names the carried tensors of another adapter."""
        config = dict(self.config)
        if isinstance(other, PeftLayout):
            for name in CARRIED_FIELDS:
                config[name] = other.config.get(name, CARRIED_FIELDS[name])
            tasks = [layout.config.get("task_type") for layout in (self, other)]
            if any(task in TASKS_WITH_HEADS for task in tasks):
                config["task_type"] = tasks[1]  # the head is one of the tensors
        return dataclasses.replace(self, config=config)

    def replaced(self, carried: Iterable[str], modules: Iterable[str]) -> list[str]:
        """Modules that PEFT cannot adapt beside carried tensors of this adapter."""
        keys = (key.removeprefix(PREFIX) for key in carried)
        return replaced(self.config, keys, modules)

    def rebased(self, base: str) -> PeftLayout:
        """The same layout with another base model in its configuration."""
        config = {**self.config, "base_model_name_or_path": base}
        return dataclasses.replace(self, config=config)

    def plan(self, contents: Contents, dtype: torch.dtype | None) -> FilePlan:
        """What will be written; see `planned` for the errors."""
        return planned(self, contents, dtype)[1]

    def stored(
        self, contents: Contents, dtype: torch.dtype | None
    ) -> tuple[Config, dict[str, Tensor]]:
        """The configuration, and key → tensor, as `plan` writes them."""
        config, plan = planned(self, contents, dtype)
        return config, plan.tensors()


def peft_layout_for(
    other: Layout,
    modules: Mapping[str, Delta],
    shapes: ModuleShapes,
    family: str,  # noqa: ARG001  # PEFT does not record it
    config: Config | None = None,
) -> PeftLayout:
    """A PEFT layout for an adapter with another layout.

    Args:
        other: The layout of the adapter.
        modules: Its modules, named as they are there.
        shapes: Module to write, named as in the base model → shape.
        family: Name of the base model's family; not used.
        config: A configuration to keep the settings of. Without one, a new configuration gives all
            modules one rank and scaling if those of the adapter are uniform.

    Returns:
        The layout.
    """
    ranks = {(delta.rank, delta.scaling) for delta in outlines(modules).values()}
    rank, scaling = next(iter(ranks)) if len(ranks) == 1 else (0, 1.0)
    uniform = config is None and rank > 0 and (rank * scaling) / rank == scaling
    new = new_config(
        list(shapes),
        rank if uniform else 1,
        rank * scaling if uniform else 1,
        other.about.base_model,
    )
    slots = tuple(
        PeftSlot(
            path=f"{PREFIX}{name}",
            name=name,
            kind="conv" if kernel else "linear",
            shape=shape,
            rank=rank if uniform else 0,
            scaling=scaling,
            dtypes=(other.dtype, other.dtype),
            kernel=kernel,
        )
        for name, (shape, kernel) in shapes.items()
    )
    if uniform:
        return PeftLayout(new, slots, other.base)
    # other modules may have names that end like these, so the targets are not a plain list
    named = {**(config or new), "target_modules": new["target_modules"]}
    return PeftLayout(named, slots, other.base, merged_from=(named,))
