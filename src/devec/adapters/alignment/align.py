"""Aligning adapters: cutting their modules into common slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from devec.adapters.alignment.cutting import (
    OutputNames,
    Slices,
    SourceModule,
    cut,
    require_no_collision,
    sliced,
    slices_of,
)
from devec.adapters.alignment.layout import AlignedLayout
from devec.adapters.data import AdapterData, AdapterT, layout_of
from devec.adapters.layout import Layout, ModuleNames, ModuleShape, ModuleShapes, extended
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError
from devec.naming.conventions import Naming
from devec.naming.families import Family
from devec.naming.module_id import parse_module_id
from devec.naming.tables import TABLES, segments_of

# From the layout of an adapter, its modules, the modules to write and the name of the family.
LayoutBuilder = Callable[[Layout, Mapping[str, Delta], ModuleShapes, str], Layout]


def aligned(adapters: Sequence[AdapterT]) -> Sequence[AdapterT]:
    """Adapters whose modules are named alike, to be written in the convention of the first.

    Args:
        adapters: Adapters with layouts.

    Returns:
        The adapters themselves if the same modules have the same names in all of them.
    """
    layouts = list(map(layout_of, adapters))
    if _agree(layouts):
        return adapters
    written = _unaligned(layouts[0])
    return realigned(adapters, written.names.naming, written.like)


def _agree(layouts: Sequence[Layout]) -> bool:
    """Whether the same module has the same name in all layouts."""
    targets = [layout.targets for layout in layouts if isinstance(layout, AlignedLayout)]
    if targets:  # slices are comparable only if they were cut together
        return len(targets) == len(layouts) and all(t is targets[0] for t in targets)
    first, *others = (layout.names for layout in layouts)
    return all(first.agree(other) for other in others)


def _unaligned(layout: Layout) -> Layout:
    """The layout of the whole modules."""
    return layout.inner if isinstance(layout, AlignedLayout) else layout


def realigned(
    adapters: Sequence[AdapterT],
    naming: Naming,
    build: LayoutBuilder,
    component: str | None = None,
) -> list[AdapterT]:
    """Adapters cut into common slices, to be written in a given convention.

    Args:
        adapters: Adapters with layouts.
        naming: How modules are named in the output.
        build: Makes the layout of the output.
        component: The component that all modules belong to, if their names do not say it.

    Returns:
        The adapters, their modules the slices, their layouts `AlignedLayout`. Modules without a
        name in the convention of the output are refused when they are written.
    """
    layouts = list(map(layout_of, adapters))
    names = [layout.names for layout in layouts]
    family = _family(names)
    family_name = family.name if family else next((n.family for n in names if n.family), "")
    modules = [m for i, adapter in enumerate(adapters) for m in cut(i, adapter, family, component)]
    require_no_collision(modules, adapters)
    output = OutputNames(family, naming, modules, [n.naming.scheme for n in names])
    slices = slices_of(modules, output)
    targets = output.targets(slices)
    kernels = _kernels(modules, layouts, slices)
    shapes = {
        module: ModuleShape(
            target.shape, next((kernels[n] for n, _ in target.slices if n in kernels), ())
        )
        for module, target in targets.items()
    }
    return [
        dataclasses.replace(
            adapter,
            modules=sliced(adapter, [m for m in modules if m.adapter == i], slices),
            layout=AlignedLayout(
                build(layouts[i], adapter.modules, shapes, family_name),
                targets,
                kernels,
                _carried_keys(adapter, layouts[i], output),
            ),
        )
        for i, adapter in enumerate(adapters)
    ]


def _family(names: Sequence[ModuleNames]) -> Family | None:
    """The family whose tables all adapters are read by: the first one used with native names."""
    tables = [
        (own.naming.scheme == "diffusers", index, TABLES[own.family])
        for index, own in enumerate(names)
        if own.family in TABLES
    ]
    return min(tables)[2]() if tables else None


def _kernels(
    modules: Sequence[SourceModule], layouts: Sequence[Layout], slices: Slices
) -> dict[str, tuple[int, ...]]:
    """Slice → kernel, for convolutions."""
    result: dict[str, tuple[int, ...]] = {}
    for module in modules:
        kernel = layouts[module.adapter].kernel(module.id)
        if kernel:
            known = result.setdefault(slices[module.keys[0]][0], kernel)
            if extended(known) != extended(kernel):
                raise IncompatibleError(
                    f"module {module.id!r} is a convolution {known} in one adapter and {kernel} in "
                    "another"
                )
    return result


def _carried_keys(adapter: AdapterData, layout: Layout, output: OutputNames) -> dict[str, str]:
    """Key of a carried tensor → its key in the output, for keys that readers of it know."""
    before, known = layout.names.naming, {key: key for key in adapter.carried}
    if isinstance(layout, AlignedLayout):
        before, known = layout.inner.names.naming, dict(layout.carried)
    if output.naming.same_ids_as(before) and output.naming.one_model == before.one_model:
        return known
    result: dict[str, str] = {}
    for key in adapter.carried if output.naming.is_comfy else ():
        module, _, end = key.rpartition(".")
        name = parse_module_id(module)
        segments = segments_of(name, (0, 1), output.family)
        whole, inside, unnamed = output.whole((name.component, segments[0].name))
        prefix = output.naming.prefix(name.component, output.family)
        if key.startswith("bundle_emb."):
            result[key] = key
        elif len(segments) == len(inside) == 1 and prefix is not None and not unnamed:
            result[key] = f"{prefix}{whole}.{end}"
    return result
