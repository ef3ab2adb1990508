"""Converting adapters from one format to another, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from devec.adapters.adapter import Adapter
from devec.adapters.algebra import provenance
from devec.adapters.alignment.align import LayoutBuilder, realigned
from devec.deltas.dora import axes_of
from devec.errors import IncompatibleError, UnsupportedError, listed
from devec.formats.magnitudes import of_outputs_only
from devec.formats.peft.layout import peft_layout_for
from devec.formats.single_file.layout import file_layout_for
from devec.lazy import outlines, selected
from devec.naming.conventions import (
    DIFFUSERS,
    KOHYA,
    KOHYA_SUFFIXES,
    PEFT_SUFFIXES,
    Naming,
    Suffixes,
    diffusers_naming,
    kohya_naming,
)
from devec.naming.families import Family
from devec.naming.module_id import CLIP_L, DENOISER_2, parse_module_id
from devec.naming.tables import TABLES

Components = frozenset[str]


def _as_kohya(family: Family | None, components: Components) -> tuple[Naming, LayoutBuilder]:
    if family is None and CLIP_L in components:
        raise IncompatibleError(
            "the base model is not known, and kohya's trainers call its text encoder lora_te in SD "
            "1 and 2 and lora_te1 in others; name the base model (--base MODEL)"
        )
    if DENOISER_2 in components:
        raise IncompatibleError(
            "kohya's files have no names for a second denoiser (transformer_2); remove one of "
            "the two (devec convert --component, devec.convert(component=))"
        )
    naming = kohya_naming(family, components)
    return naming, _file_builder(naming, KOHYA_SUFFIXES, KOHYA)


def _as_diffusers(family: Family | None, components: Components) -> tuple[Naming, LayoutBuilder]:
    naming = diffusers_naming(family, components)
    return naming, _file_builder(naming, PEFT_SUFFIXES, DIFFUSERS)


def _as_peft(_: Family | None, components: Components) -> tuple[Naming, LayoutBuilder]:
    if len(components) > 1:
        names = [name or "the denoiser" for name in sorted(components)]
        raise IncompatibleError(
            f"a PEFT directory holds the adapter of one model, and this one is of {listed(names)}; "
            "select one of them first (devec convert --component, devec.convert(component=))"
        )
    naming = Naming(dict.fromkeys(components, ""), flat=False, scheme="diffusers", one_model=True)
    return naming, peft_layout_for


def _file_builder(naming: Naming, suffixes: Suffixes, convention: str) -> LayoutBuilder:
    """A function that makes the layout of a single file."""
    return lambda other, _, shapes, family: file_layout_for(
        other, shapes, naming, suffixes, convention, family
    )


FORMATS: dict[str, Callable[[Family | None, Components], tuple[Naming, LayoutBuilder]]] = {
    "kohya": _as_kohya,
    "diffusers": _as_diffusers,
    "peft": _as_peft,
}
COMPONENTS = {
    "denoiser": "",
    "denoiser_2": DENOISER_2,
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5": "t5",
}


def convert(adapter: Adapter, format: str, *, component: str | None = None) -> Adapter:
    """The same adapter in another format.

    A module that the other format stores as several is sliced, and several that it stores as one
    are joined: ``qkv`` becomes three modules that share A, and three modules become one with a
    block-diagonal B.

    Args:
        adapter: An adapter that was read from files.
        format: ``"kohya"`` (for ComfyUI, A1111, Forge), ``"diffusers"`` or ``"peft"``.
        component: The component to keep: ``"denoiser"``, ``"denoiser_2"`` (of Wan 2.2),
            ``"clip_l"``, ``"clip_g"`` or ``"t5"``; by default all of them. For a PEFT directory,
            which does not name its component: the component that it belongs to.

    Returns:
        The adapter. It is exact, except for rounding to the storage type where alpha/r is folded
        into B (diffusers has no alpha) and is no power of two.

    Raises:
        IncompatibleError: If the format is unknown, or a module has no name in it.
        UnsupportedError: If a DoRA has magnitudes of inputs and the format has none.

    Cost: slicing and concatenating factors; base weights are read only where DoRAs and LoRAs are
    joined.

    Example:
        >>> from devec import Adapter, convert
        >>> from devec.demo.evaluate import POOL
        >>> converted = convert(Adapter.from_pretrained(POOL / "ink"), "diffusers")
        >>> converted.output_path("ink").name
        'ink.safetensors'
    """
    if format not in FORMATS:
        raise IncompatibleError(f"format must be one of {listed(list(FORMATS))}, got {format!r}")
    layout = adapter.layout
    if layout is None:
        raise IncompatibleError(
            f"adapter {adapter.name!r} was made in memory and has no names of a base model"
        )
    declared = None
    if component is not None and layout.names.naming.one_model:
        declared = _component(component)
    elif component is not None:
        adapter = _of_component(adapter, _component(component))
    table = TABLES.get(layout.names.family)
    family = table() if table else None
    components = frozenset(parse_module_id(module).component for module in adapter.modules)
    if declared is not None:
        components = frozenset([declared])
    naming, build = FORMATS[format](family, components)
    stored_in_it = layout.about.format == format and layout.names.spelled(naming)
    if stored_in_it and not layout.joins:
        result = adapter  # unchanged, including its alphas
    else:
        if format != KOHYA:
            _require_outputs(adapter)
        (result,) = realigned([adapter], naming, build, declared)
    record = provenance("convert", [adapter], format=format, component=component)
    return dataclasses.replace(result, provenance=record, source="", sha256="")


def _require_outputs(adapter: Adapter) -> None:
    """Refuse DoRAs with magnitudes of inputs, before a base weight is read."""
    of_inputs = [
        module for module, delta in outlines(adapter.modules).items() if "in" in axes_of(delta)
    ]
    if of_inputs:
        raise UnsupportedError(f"module {of_inputs[0]!r} of {adapter.label}: {of_outputs_only()}")


def _component(name: str) -> str:
    """The component with a public name."""
    if name not in COMPONENTS:
        raise IncompatibleError(
            f"component must be one of {listed(list(COMPONENTS))}, got {name!r}"
        )
    return COMPONENTS[name]


def _of_component(adapter: Adapter, component: str) -> Adapter:
    """An adapter reduced to one component."""
    modules = selected(
        adapter.modules, {m for m in adapter.modules if parse_module_id(m).component == component}
    )
    keys = {
        k for k in adapter.carried if parse_module_id(k.rpartition(".")[0]).component == component
    }
    carried = selected(adapter.carried, keys)
    if not modules:
        raise IncompatibleError(f"{adapter.label} does not change the {component or 'denoiser'}")
    return dataclasses.replace(adapter, modules=modules, carried=carried)
