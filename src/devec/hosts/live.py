"""The public functions on adapters in live models, which refer to the adapters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from devec.adapters.adapter import Adapter
from devec.adapters.pool import require_distinct_names
from devec.arguments import number
from devec.decomposition.findings import nothing_shared
from devec.decomposition.in_memory import decompose
from devec.decomposition.question import PartName, Threshold
from devec.decomposition.request import planned_parts
from devec.decomposition.result import Decomposition
from devec.errors import IncompatibleError, listed, warn
from devec.hosts.host import Host, host_of
from devec.hosts.names import require_new_names
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
    """Split adapters of a live model into shared and unique parts, and add the parts to the model.

    In every module ``shared_i = Z·Zᵀ·ΔW_i`` and ``unique_i = ΔW_i - shared_i``, where the columns
    of Z are an orthonormal basis of the shared subspace (see `devec.decompose`).

    The parts are added under new names and used through the host's own calls; the active adapters
    do not change. Every adapter is read at weight 1: mixing weights set by ``set_adapters`` or
    ``set_scale`` are not part of it, but the alpha of an adapter that was hotswapped in is. Where a
    layer's scaling could be either, a warning states how it was read, or the adapter is refused.
    The parts have the dtypes and devices of the adapters. Every tensor is compared after it was
    added.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapters: Names of two or more adapters in the host.
        threshold: Smallest squared cosine that counts as shared, in (0, 1], or ``"auto"``.
        method: ``"chain"``, ``"mean"`` or ``"principal"``.
        scope: ``"all"``, ``"pairwise"`` or ``"iterative"``.
        target: Name of the adapter to split, for scope ``"iterative"``.
        compact: Whether to reduce every part to its true rank.
        prefix: Prefix of all new names.
        unique_suffix: Suffix of unique parts, appended to the name of the adapter.
        shared_suffix: Suffix of shared parts, appended to the name of the adapter, or to ``"A+B"``
            for scope ``"pairwise"``.
        common_name: Name of the common part.

    Returns:
        The decomposition; shared + unique = original to rounding of the working precision. Its
        `outputs()` are the parts that were added, under the names that files would have. Parts that
        are zero are not added.

    Raises:
        IncompatibleError: If an adapter does not exist, is merged or unloaded, or has a scaling
            that could be a mixing weight or the alpha of a hotswapped adapter; if a new name is
            in use or not allowed, no module is in two adapters, or an argument is out of range.
        UnsupportedError: If an adapter is not a plain low-rank delta.
        OutputError: If the host does not store a part exactly; then nothing is added.

    Cost: that of `devec.decompose`, and that of adding the parts to the host.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, Eq. 5-14 and §4.3.

    Example:
        >>> import devec, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), lora, "anime")
        >>> model.add_adapter("pixel", lora)
        >>> layer = model.base_model.model[0]
        >>> layer.lora_B["anime"].weight.data[:2] = torch.eye(2)  # rows 0 and 1
        >>> layer.lora_B["pixel"].weight.data[1:3] = torch.eye(2)  # rows 1 and 2
        >>> parts = devec.decompose_adapters(model, ["anime", "pixel"])
        >>> [split.shared_rank for split in parts.splits]
        [1]
        >>> parts.shared["anime"] + parts.unique["anime"] == devec.extract_adapter(model, "anime")
        True
        >>> sorted(model.peft_config)
        ['anime', 'anime_shared', 'anime_unique', 'common', 'pixel', 'pixel_shared', 'pixel_unique']
        >>> model.set_adapter("anime_unique")
    """
    live = host_of(host)
    new_name = _new_names(prefix, unique_suffix, shared_suffix, common_name)
    pool = _read(live, adapters)
    require_distinct_names(pool)
    planned = planned_parts(list(adapters), scope, target)
    new_names = {part.label: new_name(part) for part in planned}
    require_new_names(list(new_names.values()), live.models.values(), live.names)
    _require_common_modules(pool)
    parts = decompose(pool, threshold=threshold, method=method, scope=scope, target=target)
    outputs = {new_names[label]: a for label, a in parts.outputs(compact=compact).items()}
    live.add(outputs)
    zero = [name for name in new_names.values() if name not in outputs]
    if parts.nothing_shared:
        warn(nothing_shared(parts.splits, threshold))
    elif zero:
        warn(f"{listed(zero, 20)} are zero and are not added")
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
    """Add the weighted sum of adapters of a live model to the model as one adapter.

    The sum is ``ΔW = Σ_i w_i·ΔW_i``, exact for LoRAs and DoRAs and any weights. PEFT's
    ``add_weighted_adapter`` differs: its ``"linear"`` adds factors, which also multiplies factors
    of different adapters; its ``"svd"`` forms dense matrices; and none of ``"linear"``, ``"cat"``
    and ``"svd"`` is exact for DoRAs.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapters: Names of one or more adapters in the host.
        weights: A finite number for each adapter. Mixing weights set in the host do not count.
        adapter_name: Name of the new adapter, which is added inactive.
        carried_from: Name of the adapter whose carried tensors (``modules_to_save``) the sum keeps,
            or ``"none"``. By default they are kept where that is exact (one adapter at weight 1 has
            them) and refused otherwise.

    Returns:
        The sum, exact to rounding of the working precision. Its ranks are the sums of the ranks.

    Raises:
        IncompatibleError: If an adapter does not exist or is merged or unloaded, the new name is in
            use or not allowed, or the adapters do not fit together.
        UnsupportedError: If an adapter is not a plain low-rank delta.
        OutputError: If the host does not store the sum exactly; then nothing is added.

    Cost: memory O(Σ_i r_i·(out + in)) per module.

    Example:
        >>> import devec, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), lora, "anime")
        >>> model.add_adapter("pixel", lora)
        >>> both = devec.combine_adapters(model, ["anime", "pixel"], [1.0, 0.5], "both")
        >>> anime, pixel = (devec.extract_adapter(model, name) for name in ("anime", "pixel"))
        >>> both == anime + 0.5 * pixel
        True
        >>> model.peft_config["both"].r
        4
        >>> model.set_adapter("both")
    """
    live = host_of(host)
    require_new_names([adapter_name], live.models.values(), live.names)
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
    """Add the negation of an adapter of a live model to the model, ``ΔW = -scale·ΔW_adapter``.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter: Name of an adapter in the host.
        adapter_name: Name of the new adapter, which is added inactive; by default the name of
            `adapter` with ``"_negated"`` appended.
        scale: The coefficient, a finite number.
        carried_from: Name of the adapter if the negation keeps its carried tensors
            (``modules_to_save``) unchanged, or ``"none"`` if it leaves them out. By default they
            are refused, unless the weight ``-scale`` is 1.

    Returns:
        The negation, exact to rounding of the working precision, with the rank of the adapter.

    Raises:
        IncompatibleError: If the adapter does not exist or is merged or unloaded, the new name is
            in use or not allowed, or `scale` is not a finite number.
        UnsupportedError: If the adapter is not a plain low-rank delta.
        OutputError: If the host does not store the negation exactly; then nothing is added.

    Cost: memory O(r·(out + in)) per module.

    Reference: Damirchi et al. 2025, arXiv 2512.22511, §4.3.

    Example:
        >>> import devec, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), lora, "toxic")
        >>> negated = devec.negate_adapter(model, "toxic", scale=0.5)
        >>> negated == -0.5 * devec.extract_adapter(model, "toxic")
        True
        >>> model.set_adapter("toxic_negated")
    """
    scale = number(scale, "scale")
    name = f"{adapter}_negated" if adapter_name is None else adapter_name
    return combine_adapters(host, [adapter], [-scale], name, carried_from=carried_from)


def extract_adapter(host: object, adapter_name: str) -> Adapter:
    """Read an adapter of a live model as a value.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter_name: Name of an adapter in the host.

    Returns:
        The adapter at weight 1, exact; its tensors are copies. It is saved in the format of its
        host: a PEFT directory, with the embeddings of the base model where PEFT saves them (if the
        vocabulary was resized or the adapter is on an embedding), or a file of diffusers.

    Raises:
        IncompatibleError: If the adapter does not exist, is merged or unloaded, or has a scaling
            that could be a mixing weight or the alpha of a hotswapped adapter.
        UnsupportedError: If the adapter is not a plain low-rank delta.

    Cost: memory of one copy of the adapter.

    Example:
        >>> import devec, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), lora, "anime")
        >>> adapter = devec.extract_adapter(model, "anime")
        >>> delta = adapter.modules["0"]
        >>> tuple(delta.B.shape), tuple(delta.A.shape), delta.scaling
        ((6, 2), (2, 6), 2.0)
    """
    return host_of(host).read(adapter_name)


def add_adapter(host: object, adapter: Adapter, adapter_name: str) -> None:
    """Add an adapter to a live model; the active adapters do not change.

    Args:
        host: A `PeftModel`, a model of transformers, or a model or pipeline of diffusers.
        adapter: The adapter, read from any format. Its tensors are converted to the dtype of the
            model where that is wider than their own.
        adapter_name: Name of the adapter in the model.

    Raises:
        IncompatibleError: If `adapter` is not an `Adapter`, the name is in use or not allowed, or
            the adapter changes layers that the model does not have, or whose names occur in several
            components of it and nothing tells which one is meant.
        UnsupportedError: If the host cannot represent the adapter.
        OutputError: If the host does not store the adapter exactly; then nothing is added.

    Cost: memory of one copy of the adapter.

    Example:
        >>> import devec, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), lora, "anime")
        >>> half = devec.extract_adapter(model, "anime") / 2
        >>> devec.add_adapter(model, half, "half_anime")
        >>> devec.extract_adapter(model, "half_anime") == half
        True
        >>> model.active_adapters
        ['anime']
    """
    if not isinstance(adapter, Adapter):
        raise IncompatibleError(
            f"expected an adapter, got {type(adapter).__name__}; read one with "
            "devec.Adapter.from_pretrained"
        )
    host_of(host).add({adapter_name: adapter}, foreign=True)


def _new_names(
    prefix: str, unique_suffix: str, shared_suffix: str, common_name: str
) -> Callable[[PartName], str]:
    """The function from a part to the name that it gets in the model."""
    for name in (prefix, unique_suffix, shared_suffix, common_name):
        if not isinstance(name, str):
            raise IncompatibleError(f"names are made of strings, got {name!r}")
    suffixes = {"unique": unique_suffix, "shared": shared_suffix}

    def new_name(part: PartName) -> str:
        own = common_name if part.kind == "common" else f"{part.owner}{suffixes[part.kind]}"
        return f"{prefix}{own}"

    return new_name


def _read(live: Host, names: Sequence[str]) -> list[Adapter]:
    """Read adapters of a host by their names."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise IncompatibleError(
            f"expected names of adapters that {live.label} holds, a list of strings, got {names!r}"
        )
    return [live.read(name) for name in names]


def _require_common_modules(pool: Sequence[Adapter]) -> None:
    """Refuse a pool in which no module is in two adapters: there is nothing to split."""
    if len(pool) > 1 and not any(a.modules.keys() & b.modules for a, b in combinations(pool, 2)):
        examples = "; ".join(f"{a.name!r} changes {listed(list(a.modules), 2)}" for a in pool)
        raise IncompatibleError(f"no module is in two of the adapters: {examples}")


def _warn_of_doras(outputs: Mapping[str, Adapter]) -> None:
    """Warn that hosts chain active DoRAs instead of adding them, and name the call that adds."""
    doras = [n for n, a in outputs.items() if any(d.gain is not None for d in a.modules.values())]
    if len(doras) > 1:
        warn(
            f"{listed(doras)} are DoRAs, of which at most one may be active, listed first: a host "
            "applies active DoRAs one after another, each of which scales those before it, rather "
            "than adding them. To activate several, add their sum "
            "(devec.combine_adapters(host, adapters, weights, adapter_name))"
        )
