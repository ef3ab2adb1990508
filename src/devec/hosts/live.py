"""The operations on adapters that live models hold, by the names they have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from devec.adapters.adapter import Adapter
from devec.adapters.pool import require_distinct_names
from devec.arguments import number
from devec.decomposition.findings import nothing_shared
from devec.decomposition.in_memory import decompose
from devec.decomposition.question import Threshold, planned_outputs
from devec.decomposition.result import Decomposition
from devec.errors import IncompatibleError, listed, warn
from devec.hosts.host import Host, host_of
from devec.hosts.names import require_names
from devec.operations.combine import combine


def decompose_adapters(
    host: object,
    adapters: Sequence[str],
    *,
    threshold: Threshold = 0.85,
    method: str = "chain",
    scope: str = "all",
    target: str | None = None,
    compact: bool = False,
    prefix: str = "",
    unique_suffix: str = "_unique",
    shared_suffix: str = "_shared",
    common_name: str = "common",
) -> Decomposition:
    """Split adapters of a live model into shared and unique parts, which it then holds, too.

        devec.decompose_adapters(pipe, ["anime", "pixel"])
        pipe.set_adapters(["anime_unique", "pixel_unique"])

    The weights that are set for mixing are no part of an adapter: each is taken at weight 1, and
    with the alpha of an adapter that was hotswapped in its place. Where a scaling could be either,
    a warning states the reading, or the adapter is refused. What is active stays active. The parts
    are `devec.decompose`'s, in the types and on the devices of
    the adapters; every tensor is compared after it was added.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapters: Names of two or more adapters that it holds.
        threshold: Squared cosine above which directions count as shared, in (0, 1], or ``"auto"``.
        method: ``"chain"``, ``"mean"`` or ``"principal"``.
        scope: ``"all"``, ``"pairwise"`` or ``"iterative"``.
        target: Name of the adapter to split, for scope ``"iterative"``.
        compact: Whether to cut every part to its true rank.
        prefix: What all new names begin with.
        unique_suffix: What the name of a unique part ends with, after that of its adapter.
        shared_suffix: What that of a shared part ends with; for scope ``"pairwise"`` after
            ``"A+B"``.
        common_name: Name of the common vector.

    Returns:
        The decomposition. Its `outputs()` are what was added, there under the names that files
        would have; parts that hold nothing are not.

    Raises:
        IncompatibleError: If an adapter is not known, merged or unloaded, or has a weight that
            could be the alpha of a hotswapped adapter; if a name is taken or cannot be had, no
            module is in two adapters, or an argument is out of range.
        UnsupportedError: If an adapter is not a plain low-rank delta.
        OutputError: If the host does not hold what it was given; nothing is added then.

    Cost: that of `devec.decompose`, and what the host needs to add the parts.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.
    """
    for part in (prefix, unique_suffix, shared_suffix, common_name):
        if not isinstance(part, str):
            raise IncompatibleError(f"names are made of strings, got {part!r}")
    live = host_of(host)
    pool = _read(live, adapters)
    require_distinct_names(pool)
    ends = {"unique": unique_suffix, "shared": shared_suffix}

    def called(part: str) -> str:
        name, _, kind = part.rpartition("-")
        return f"{prefix}{name}{ends[kind]}" if name else f"{prefix}{common_name}"

    planned = planned_outputs(list(adapters), scope, target).values()
    require_names([called(part) for part in planned], live.models.values(), live.names)
    _require_common_modules(pool)
    parts = decompose(pool, threshold=threshold, method=method, scope=scope, target=target)
    outputs = {called(part): a for part, a in parts.outputs(compact=compact).items()}
    live.add(outputs)
    empty = [called(part) for part in planned if called(part) not in outputs]
    if parts.nothing_shared:
        warn(nothing_shared(parts.splits, threshold))
    elif empty:
        warn(f"{listed(empty, 20)} would hold nothing and are not added")
    _warn_of_doras(outputs)
    return parts


def combine_adapters(
    host: object,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    carried_from: str | None = None,
) -> Adapter:
    """Add Σ w_i · adapter_i to a live model as one adapter, exact for LoRAs and DoRAs.

    What `add_weighted_adapter` is for, with any weights: its ``"linear"`` adds the products of
    different adapters' factors, its ``"svd"`` makes dense weights, and all of it takes DoRAs and
    gives something else.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapters: Names of adapters that it holds.
        weights: A finite weight for each, beside which those that are set for mixing do not count.
        adapter_name: Name of the new adapter, which is left inactive.
        carried_from: Name of the adapter whose whole trained modules (``modules_to_save``) the
            combination keeps, or ``"none"``; needed where that is not clear.

    Returns:
        The combination as it was added; ranks add.

    Raises:
        IncompatibleError: If an adapter is not known, merged or unloaded, the name cannot be had,
            or the adapters do not fit together.
        UnsupportedError: If an adapter is not a plain low-rank delta.
        OutputError: If the host does not hold what it was given; nothing is added then.

    Cost: memory O(Σ r_i·(out + in)) per module.
    """
    live = host_of(host)
    require_names([adapter_name], live.models.values(), live.names)
    pool = _read(live, adapters)
    result = combine(pool, weights, name=adapter_name, carried_from=carried_from)
    live.add({adapter_name: result})
    return result


def negate_adapter(
    host: object,
    adapter: str,
    adapter_name: str | None = None,
    *,
    scale: float = 1.0,
    carried_from: str | None = None,
) -> Adapter:
    """Add -scale · adapter to a live model.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter: Name of an adapter that it holds.
        adapter_name: Name of the new one, by default that of the other and ``"_negated"``.
        scale: The coefficient of negation.
        carried_from: As in `combine_adapters`.

    Returns:
        The negated adapter as it was added.

    Raises:
        IncompatibleError: If the adapter is not known, merged or unloaded, or the name cannot be
            had.
        UnsupportedError: If it is not a plain low-rank delta.
        OutputError: If the host does not hold what it was given; nothing is added then.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, §4.3.
    """
    scale = number(scale, "scale")
    name = f"{adapter}_negated" if adapter_name is None else adapter_name
    return combine_adapters(host, [adapter], [-scale], name, carried_from=carried_from)


def extract_adapter(host: object, adapter_name: str) -> Adapter:
    """An adapter that a live model holds, as a value.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter_name: Name of an adapter that it holds.

    Returns:
        The adapter, at weight 1, its tensors copied. It is stored as its host would store it: as a
        PEFT directory, with embeddings of the base model where PEFT saves them (if the vocabulary
        was resized, or the adapter is on them), or as one file of diffusers.

    Raises:
        IncompatibleError: If the adapter is not known, merged or unloaded, or has a weight that
            could be the alpha of a hotswapped adapter.
        UnsupportedError: If it is not a plain low-rank delta.
    """
    return host_of(host).read(adapter_name)


def add_adapter(host: object, adapter: Adapter, adapter_name: str) -> None:
    """Add an adapter to a live model, wherever it comes from, and leave it inactive.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter: The adapter, in whatever format it was read. Its tensors get the type of the
            model, where that is wider than what they are stored in.
        adapter_name: Its name in the model.

    Raises:
        IncompatibleError: If the name cannot be had, or the adapter changes layers that the model
            does not have, or that are in several parts of it and nothing shows which is meant.
        UnsupportedError: If the model cannot hold it.
        OutputError: If the host does not hold what it was given; nothing is added then.
    """
    if not isinstance(adapter, Adapter):
        raise IncompatibleError(
            f"expected an adapter, got {type(adapter).__name__}; read one with "
            "devec.Adapter.from_pretrained"
        )
    host_of(host).add({adapter_name: adapter}, foreign=True)


def _read(live: Host, names: Sequence[str]) -> list[Adapter]:
    """Adapters of a host by their names."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise IncompatibleError(
            f"expected names of adapters that {live.label} holds, a list of strings, got {names!r}"
        )
    return [live.read(name) for name in names]


def _require_common_modules(pool: Sequence[Adapter]) -> None:
    """Refuse adapters that change different modules: there is nothing to split."""
    if len(pool) > 1 and not any(a.modules.keys() & b.modules for a, b in combinations(pool, 2)):
        some = "; ".join(f"{a.name!r} changes {listed(list(a.modules), 2)}" for a in pool)
        raise IncompatibleError(f"no module is in two of the adapters: {some}")


def _warn_of_doras(outputs: Mapping[str, Adapter]) -> None:
    """Say what hosts make of two DoRAs, and which call adds them."""
    doras = [n for n, a in outputs.items() if any(d.gain is not None for d in a.modules.values())]
    if len(doras) > 1:
        warn(
            f"{listed(doras)} are DoRAs, of which a host can have one active, listed first, for an "
            "exact sum: it runs several in a chain, each scaling those before it; for more than "
            "one, add their sum (devec.combine_adapters(host, adapters, weights, adapter_name))"
        )
