"""What is done with several adapters: sums, inner products, distances, on common modules.

An adapter is a vector; here is the algebra of such vectors, module by module and in factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from devec.adapters.layout import Layout
from devec.arguments import numbers
from devec.deltas.delta import Delta
from devec.deltas.sums import resolve_together, weighted_sum
from devec.errors import IncompatibleError, listed, located
from devec.lazy import LazyMapping, outlines
from devec.linalg.precision import full_precision

if TYPE_CHECKING:
    from devec.adapters.adapter import Adapter


@full_precision
def inner(a: Adapter, b: Adapter) -> float:
    """Frobenius inner product of two adapters, over the modules that both have.

    Args:
        a: An adapter.
        b: An adapter of the same base model.

    Returns:
        Σ ⟨ΔW_a, ΔW_b⟩, exact to rounding.

    Raises:
        IncompatibleError: If a module has different shapes in the two.
    """
    a, b = on_common_modules([a, b])
    products: list[float] = []
    for module in a.modules.keys() & b.modules.keys():
        with located(f"module {module!r}"):
            held = resolve_together({"a": a.modules[module], "b": b.modules[module]})
            products.append(held["a"].inner(held["b"]))
    return math.fsum(products)


@full_precision
def cosine(a: Adapter, b: Adapter) -> float:
    """Cosine of the angle between two adapters as vectors, ⟨a, b⟩/(‖a‖·‖b‖).

    Args:
        a: An adapter.
        b: An adapter of the same base model.

    Returns:
        The cosine in [-1, 1]; nan if either adapter is zero.
    """
    return cosine_of(inner(a, b), a.norm(), b.norm())


def cosine_of(inner: float, first: float, second: float) -> float:
    """The cosine of the angle between two vectors.

    Args:
        inner: Their inner product.
        first: Norm of the first.
        second: Norm of the second.

    Returns:
        The cosine, in [-1, 1] also where rounding makes the quotient larger; nan if a norm is 0.
    """
    scale = first * second
    if not scale:
        return math.nan
    cosine = inner / scale
    return math.copysign(1.0, cosine) if abs(cosine) > 1 else cosine


@full_precision
def distance(a: Adapter, b: Adapter) -> float:
    """Frobenius distance ‖a - b‖ of two adapters' effects, however each is factored.

    Computed from the factors of the difference, not from ‖a‖² - 2⟨a, b⟩ + ‖b‖², so that nearly
    equal adapters keep their accuracy.

    Args:
        a: An adapter.
        b: An adapter of the same base model.

    Returns:
        The distance; 0 to rounding if and only if the two change every module alike. Where the
        terms of DoRAs cancel, blocks of rows are summed, for which base weights are read again.

    Raises:
        IncompatibleError: If a module has different shapes in the two.
    """
    return math.hypot(*distances(*on_common_modules([a, b])))


@full_precision
def distances(a: Adapter, b: Adapter) -> tuple[float, float]:
    """The distances of the weights and of the biases of adapters on common modules."""
    weights, biases = [], []
    for module in dict.fromkeys((*a.modules, *b.modules)):
        held = [x.modules[module] for x in (a, b) if module in x.modules]
        with located(f"module {module!r}"):
            difference = weighted_sum(held, (1.0, -1.0)[: len(held)]).resolved()
            weights.append(difference.weight_norm())
            biases.append(difference.bias_norm())
    return math.hypot(*weights), math.hypot(*biases)


@full_precision
def linear_combination(
    adapters: Sequence[Adapter], weights: Sequence[float], carried_from: str | None = None
) -> Adapter:
    """Σ w_i · adapter_i, exact: ranks add where several adapters change a module.

    Args:
        adapters: Adapters of one base model, at least one.
        weights: One finite weight for each.
        carried_from: Name of the adapter whose carried tensors the result keeps, or ``"none"`` to
            leave all of them out. None refuses if there are any, since full tensors do not add.

    Returns:
        The combination, named and stored like the first adapter. Of LoRAs whose modules are read
        when they are asked for (``lazy=True``) it is one of those, too.

    Raises:
        IncompatibleError: If the adapters do not fit together or carry tensors.
    """
    adapters = on_common_modules(adapters)
    weights = numbers(weights, "weights")
    sums = _sums([adapter.modules for adapter in adapters], tuple(map(float, weights)))
    carrier = _carrier(adapters, weights, carried_from)
    layout = merged_layout(adapters)
    if layout is not None and carrier is not None and carrier.layout is not None:
        _require_no_replaced(adapters, carrier, carrier.layout)
        layout = layout.carrying(carrier.layout)
    return dataclasses.replace(
        adapters[0],
        modules=sums,
        layout=layout,
        carried={} if carrier is None else carrier.carried,
        provenance=provenance(
            "combine", adapters, weights=list(weights), carried_from=carried_from
        ),
        source="",
        sha256="",
    )


def _sums(pool: Sequence[Mapping[str, Delta]], weights: Sequence[float]) -> Mapping[str, Delta]:
    """Weighted sums of modules; those of lazy LoRAs are made when they are asked for."""
    known = [outlines(modules) for modules in pool]
    order = dict.fromkeys(module for modules in known for module in modules)
    gained = any(delta.gain is not None for modules in known for delta in modules.values())
    lazy = any(isinstance(modules, LazyMapping) for modules in pool)

    def total(module: str, *, outlined: bool = False) -> Delta:
        terms = [
            (outlines(modules)[module].outline if outlined else modules[module], weight)
            for modules, weight in zip(pool, weights, strict=True)
            if module in modules
        ]
        with located(f"module {module!r}"):
            return weighted_sum(*zip(*terms, strict=True))

    if lazy and not gained:  # what a sum with a DoRA is like shows when its base weight is read
        return LazyMapping({module: total(module, outlined=True) for module in order}, total)
    return {module: total(module) for module in order}


def on_common_modules(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Adapters of one base model whose modules have the same names in all of them.

    Args:
        adapters: The adapters. Those of different file formats are cut into common pieces.

    Returns:
        The adapters, changed only where their formats name or store modules differently.

    Raises:
        IncompatibleError: If the modules they have in common differ in shape; the message names
            the modules and the adapters.
    """
    layouts = [adapter.layout for adapter in adapters]
    if len(adapters) > 1 and layouts[0] is not None and None not in layouts:
        with located(" and ".join(a.label for a in adapters)):
            adapters = layouts[0].aligned(adapters)
    first_with: dict[str, Adapter] = {}
    for adapter in adapters:
        clashes = []
        for module, delta in outlines(adapter.modules).items():
            known = first_with.setdefault(module, adapter)
            if outlines(known.modules)[module].shape != delta.shape:
                clashes.append((module, known))
        if clashes:
            module, known = clashes[0]
            raise IncompatibleError(
                f"{adapter.label} and {known.label} are adapters of different base models: "
                f"{len(clashes)} modules differ in shape ({listed([m for m, _ in clashes])}); "
                f"e.g. {module!r} is {outlines(adapter.modules)[module].shape} in "
                f"{adapter.name!r} and {outlines(known.modules)[module].shape} in {known.name!r} "
                "(out, in)"
            )
    return adapters


def merged_layout(adapters: Sequence[Adapter]) -> Layout | None:
    """The layout of a result made of several adapters; None if any was made in memory."""
    layouts = [a.layout for a in adapters if a.layout is not None]
    if len(layouts) < len(adapters):
        return None
    with located(" and ".join(a.label for a in adapters)):
        return layouts[0].merged(layouts[1:])


def provenance(operation: str, inputs: Sequence[Adapter], **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    """The record of an operation that output files keep.

    Args:
        operation: Name of the operation.
        inputs: The adapters it was applied to.
        **parameters: Its parameters, as JSON values.

    Returns:
        A JSON-serialisable record with the inputs' names, digests and own records.
    """
    return {
        "operation": operation,
        "parameters": parameters,
        "inputs": [
            {"name": a.name, "sha256": a.sha256}
            if a.provenance is None or a.sha256
            else {"name": a.name, "made_by": a.provenance}
            for a in inputs
        ],
    }


def _carrier(
    adapters: Sequence[Adapter], weights: Sequence[float], carried_from: str | None
) -> Adapter | None:
    """The adapter whose carried tensors a combination keeps: the one named, or where that is exact.

    A whole tensor T stands for the change T - T0. With one carrier, at weight 1, the combination
    holds that change once, and so holds T.

    Returns:
        The adapter, or None where no tensors are kept.

    Raises:
        IncompatibleError: If the combination of tensors would not be one of them.
    """
    if carried_from is not None and carried_from != "none":
        for adapter in adapters:
            if adapter.name == carried_from:
                return adapter
        names = listed([a.name for a in adapters])
        raise IncompatibleError(f"no adapter is named {carried_from!r}; there are {names}")
    carriers = [(a, w) for a, w in zip(adapters, weights, strict=True) if a.carried]
    if not carriers or carried_from == "none":
        return None
    adapter, weight = carriers[0]
    if len(carriers) == 1 and weight == 1:
        return adapter
    raise IncompatibleError(
        f"{adapter.label} holds whole trained tensors ({listed(sorted(adapter.carried))}) which "
        "are not deltas and cannot be added or scaled; name the one adapter whose tensors the "
        "result shall keep (carried_from=NAME, --carried-from NAME), or 'none'"
    )


def same_base_models(a: Adapter, b: Adapter) -> bool:
    """Whether no module is a DoRA of one base model in one adapter and of another in the other."""
    for module in outlines(a.modules).keys() & outlines(b.modules).keys():
        gains = (outlines(x.modules)[module].gain for x in (a, b))
        if len({gain.base.source for gain in gains if gain is not None}) > 1:
            return False
    return True


def _require_no_replaced(adapters: Sequence[Adapter], carrier: Adapter, layout: Layout) -> None:
    """Refuse sums of which a host would load the whole module of one adapter and lose the others.

    Raises:
        IncompatibleError: If another adapter changes a module that a carried tensor replaces.
    """
    for adapter in adapters:
        lost = [] if adapter is carrier else layout.replaced(carrier.carried, adapter.modules)
        if lost:
            raise IncompatibleError(
                f"{carrier.label} replaces {listed(lost)} by whole trained tensors, and "
                f"{adapter.label} changes the same by factors, which no host adds to them. "
                "Leave the whole tensors out (carried_from='none', --carried-from none), or leave "
                f"the modules out of {adapter.name!r} (dataclasses.replace(adapter, modules=...))"
            )


def same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are identical."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
