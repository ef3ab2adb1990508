"""Operations on several adapters: linear combinations, inner products, distances, equality.

An adapter is a vector. Adapters are aligned to common modules first; then each operation works
module by module, on the low-rank factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from devec.adapters.alignment.align import aligned
from devec.adapters.data import AdapterData, AdapterT
from devec.adapters.layout import Layout
from devec.arguments import numbers
from devec.deltas.delta import Delta
from devec.deltas.sums import resolve_together, weighted_sum
from devec.errors import IncompatibleError, UnsupportedError, listed, located
from devec.lazy import LazyMapping, outlines
from devec.linalg.precision import full_precision

# Adapters have the same effect if they differ by less than this fraction of the norm of their
# factors, and their biases by less than this fraction of theirs: a few units of float32 roundoff,
# the precision that factors are combined in. The norm of the factors is the scale, not that of the
# sum: a - a is zero up to rounding of terms as large as a.
EFFECT_RTOL = 1e-6


@full_precision
def inner(a: AdapterData, b: AdapterData) -> float:
    """Frobenius inner product of two adapters, summed over the modules that both change.

    Formula: Σ_m ⟨ΔW_a,m, ΔW_b,m⟩_F, with biases as further columns.

    Args:
        a: An adapter.
        b: An adapter of the same base model, in any format.

    Returns:
        The inner product, exact to rounding. It is 0 if no module is common to both.

    Raises:
        IncompatibleError: If a module has different shapes in the two adapters.

    Cost: O(Σ (out + in)·r²) for LoRAs; DoRAs read each base weight once.

    Example:
        >>> import torch
        >>> from devec import Adapter, Delta, inner
        >>> a = Adapter("a", {"layer": Delta(torch.ones(3, 1), torch.ones(1, 2))})
        >>> inner(a, 2 * a)
        12.0
    """
    a, b = on_common_modules([a, b])
    products: list[float] = []
    for module in a.modules.keys() & b.modules.keys():
        with located(f"module {module!r}"):
            pair = resolve_together({"a": a.modules[module], "b": b.modules[module]})
            products.append(pair["a"].inner(pair["b"]))
    return math.fsum(products)


@full_precision
def adapter_norm(adapter: AdapterData) -> float:
    """Frobenius norm of an adapter over all modules, biases included."""
    norms = []
    for module, delta in adapter.modules.items():
        with located(f"module {module!r} of {adapter.label}"):
            norms.append(delta.norm())
    return math.hypot(*norms)


@full_precision
def cosine(a: AdapterData, b: AdapterData) -> float:
    """Cosine of the angle between two adapters as vectors.

    Formula: ⟨a, b⟩ / (‖a‖·‖b‖), where the norms include modules that only one adapter changes.

    Args:
        a: An adapter.
        b: An adapter of the same base model, in any format.

    Returns:
        The cosine in [-1, 1], exact to rounding; nan if either adapter is zero.

    Raises:
        IncompatibleError: If a module has different shapes in the two adapters.

    Cost: O(Σ (out + in)·r²) for LoRAs; DoRAs read base weights.

    Example:
        >>> import torch
        >>> from devec import Adapter, Delta, cosine
        >>> a = Adapter("a", {"layer": Delta(torch.ones(3, 1), torch.ones(1, 2))})
        >>> round(cosine(a, -3 * a), 6)
        -1.0
    """
    return cosine_of(inner(a, b), adapter_norm(a), adapter_norm(b))


def cosine_of(inner: float, first: float, second: float) -> float:
    """The cosine from an inner product and two norms, clipped to [-1, 1]; nan if a norm is 0."""
    scale = first * second
    if not scale:
        return math.nan
    cosine = inner / scale
    return math.copysign(1.0, cosine) if abs(cosine) > 1 else cosine


@full_precision
def distance(a: AdapterData, b: AdapterData) -> float:
    """Frobenius distance ‖a - b‖ between the effects of two adapters, however they are factored.

    It is computed from the factors of the difference, not from ‖a‖² - 2⟨a, b⟩ + ‖b‖², so that the
    distance of nearly equal adapters is accurate.

    Args:
        a: An adapter.
        b: An adapter of the same base model, in any format. A module that one adapter lacks counts
            as zero there.

    Returns:
        The distance, exact to rounding; 0 to rounding if and only if the adapters change every
        module alike.

    Raises:
        IncompatibleError: If a module has different shapes in the two adapters.

    Cost: O(Σ (out + in)·r²) for LoRAs. DoRAs read base weights, and read them again where their
    terms cancel.

    Example:
        >>> import torch
        >>> from devec import Adapter, Delta, distance
        >>> a = Adapter("a", {"layer": Delta(torch.ones(4, 1), torch.ones(1, 4))})
        >>> round(distance(a, 0.5 * a), 6)
        2.0
    """
    return math.hypot(*distances(*on_common_modules([a, b])))


@full_precision
def distances(a: AdapterData, b: AdapterData) -> tuple[float, float]:
    """The distances of the weights and of the biases of adapters on common modules."""
    weights, biases = [], []
    for module in dict.fromkeys((*a.modules, *b.modules)):
        terms = [x.modules[module] for x in (a, b) if module in x.modules]
        with located(f"module {module!r}"):
            difference = weighted_sum(terms, (1.0, -1.0)[: len(terms)]).resolved()
            weights.append(difference.weight_norm())
            biases.append(difference.bias_norm())
    return math.hypot(*weights), math.hypot(*biases)


@full_precision
def same_effect(a: AdapterData, b: AdapterData) -> bool:
    """Whether two adapters differ by rounding only, and their carried tensors are identical."""
    try:
        one, two = on_common_modules([a, b])
    except (IncompatibleError, UnsupportedError):  # of different base models or kinds
        return False
    if not _same_tensors(one.carried, two.carried):
        return False
    one, two = differing_modules(one, two), differing_modules(two, one)
    if not _same_base_models(one, two):
        return False
    terms = [*one.modules.values(), *two.modules.values()]
    weights, biases = distances(one, two)
    return weights <= EFFECT_RTOL * math.hypot(
        *(delta.factor_norm() for delta in terms)
    ) and biases <= EFFECT_RTOL * math.hypot(*(delta.bias_norm() for delta in terms))


def differing_modules(adapter: AdapterT, other: AdapterData) -> AdapterT:
    """An adapter without the modules whose tensors are identical to those of another adapter."""
    modules = {
        module: delta
        for module, delta in adapter.modules.items()
        if module not in other.modules or not delta.same_as(other.modules[module])
    }
    return dataclasses.replace(adapter, modules=modules)


def _same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are identical."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def _same_base_models(a: AdapterData, b: AdapterData) -> bool:
    """Whether no module is a DoRA of one base model in one adapter and of another in the other."""
    for module in outlines(a.modules).keys() & outlines(b.modules).keys():
        gains = (outlines(x.modules)[module].gain for x in (a, b))
        if len({gain.base.source for gain in gains if gain is not None}) > 1:
            return False
    return True


@full_precision
def linear_combination(
    adapters: Sequence[AdapterT], weights: Sequence[float], carried_from: str | None = None
) -> AdapterT:
    """Σ w_i · adapter_i, exact; the ranks of a module add up.

    Args:
        adapters: Adapters of one base model, at least one.
        weights: One finite weight for each.
        carried_from: Name of the adapter whose carried tensors the result keeps, or ``"none"`` to
            leave all of them out. With None, carried tensors that would have to be added or scaled
            are refused.

    Returns:
        The combination, named and stored like the first adapter. It is lazy if a LoRA among them
        is and none is a DoRA.

    Raises:
        IncompatibleError: If the adapters do not fit together or carry tensors.
    """
    adapters = on_common_modules(adapters)
    weights = numbers(weights, "weights")
    sums = _weighted_sums([adapter.modules for adapter in adapters], tuple(map(float, weights)))
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


def _weighted_sums(
    pool: Sequence[Mapping[str, Delta]], weights: Sequence[float]
) -> Mapping[str, Delta]:
    """Module → weighted sum of its deltas, computed on access if a LoRA among them is lazy."""
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

    if lazy and not gained:  # the outline of a sum with a DoRA depends on its base weight
        return LazyMapping({module: total(module, outlined=True) for module in order}, total)
    return {module: total(module) for module in order}


def on_common_modules(adapters: Sequence[AdapterT]) -> Sequence[AdapterT]:
    """Adapters of one base model, aligned so that the same module has the same name in all.

    Args:
        adapters: The adapters. Modules that formats store differently are cut into common slices.

    Returns:
        The adapters; the same objects if their modules are named alike.

    Raises:
        IncompatibleError: If modules with the same name differ in shape; the message names the
            modules and the adapters.
    """
    if len(adapters) > 1 and all(adapter.layout is not None for adapter in adapters):
        with located(" and ".join(a.label for a in adapters)):
            adapters = aligned(adapters)
    first_with: dict[str, AdapterT] = {}
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


def merged_layout(adapters: Sequence[AdapterData]) -> Layout | None:
    """The layout of a result made of several adapters; None if any was made in memory."""
    layouts = [a.layout for a in adapters if a.layout is not None]
    if len(layouts) < len(adapters):
        return None
    with located(" and ".join(a.label for a in adapters)):
        return layouts[0].merged(layouts[1:])


def provenance(operation: str, inputs: Sequence[AdapterData], **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    """The JSON record of an operation: its parameters, and the digests or records of its inputs."""
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
    adapters: Sequence[AdapterT], weights: Sequence[float], carried_from: str | None
) -> AdapterT | None:
    """The adapter whose carried tensors a combination keeps: the named one, or the only one.

    A whole tensor T stands for the change T - T0. With one carrier, at weight 1, the combination
    contains that change once, and so contains T.

    Returns:
        The adapter; None if no tensors are kept.

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


def _require_no_replaced(
    adapters: Sequence[AdapterData], carrier: AdapterData, layout: Layout
) -> None:
    """Refuse sums with a module that a host would replace by a carried tensor of one adapter."""
    for adapter in adapters:
        lost = [] if adapter is carrier else layout.replaced(carrier.carried, adapter.modules)
        if lost:
            raise IncompatibleError(
                f"{carrier.label} replaces {listed(lost)} by whole trained tensors, and "
                f"{adapter.label} changes the same by factors, which no host adds to them. "
                "Leave the whole tensors out (carried_from='none', --carried-from none), or leave "
                f"the modules out of {adapter.name!r} (dataclasses.replace(adapter, modules=...))"
            )
