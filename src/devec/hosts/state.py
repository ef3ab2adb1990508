"""One adapter in one live model, as PEFT holds it: its configuration and tensors, out and in."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devec.errors import FormatError, IncompatibleError, OutputError, UnsupportedError, listed
from devec.formats.peft.config import targets
from devec.formats.peft.names import PREFIX, lookup_name
from devec.formats.peft.written_config import exact_targets
from devec.formats.rank_patterns import Config, rank_and_scaling, rank_pattern
from devec.hosts.layers import Parts, is_wrapper, walk
from devec.hosts.scaling import scaling_of
from devec.naming.conventions import MAGNITUDE_VECTOR


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Name → configuration of the adapters that a model says it holds."""
    return dict(getattr(model, "peft_config", None) or {})


def replication_of(model: nn.Module) -> list[list[int]] | None:
    """How the layers of a model were replicated for its adapters.

    Args:
        model: The model.

    Returns:
        The field ``layer_replication`` of its adapters, None if no layer was replicated.

    Raises:
        UnsupportedError: If they were replicated for one adapter and again for another.
    """
    found = [_ranges(config) for config in adapters_of(model).values()]
    found = [ranges for ranges in found if ranges]
    if any(ranges != found[0] for ranges in found):
        raise UnsupportedError(
            f"the layers of {type(model).__name__} were replicated for one adapter and again for "
            f"another (layer_replication {listed([str(r) for r in found])}), so that no name of a "
            "layer says which it is; load each of the adapters into a model of its own"
        )
    return found[0] if found else None


def require_same_replication(model: nn.Module, config: Config) -> None:
    """Refuse an adapter whose layers are not numbered as those of a model are.

    Args:
        model: The model that the adapter is to be added to.
        config: The configuration of the adapter.

    Raises:
        IncompatibleError: If one of the two has replicated layers and the other not the same.
    """
    own, wanted = replication_of(model), config.get("layer_replication") or None
    wanted = None if wanted is None else [list(pair) for pair in wanted]
    if own == wanted:
        return
    kind = type(model).__name__
    if wanted is None:
        what = f"{kind} has replicated layers (layer_replication={own}), and it has none"
    else:
        has = f"layer_replication={own}" if own else "none"
        what = f"it is for replicated layers (layer_replication={wanted}), and {kind} has {has}"
    raise IncompatibleError(
        f"{what}, so the same number is another layer, and adding it would have to change the "
        "model; load it with PEFT into a base model of its own (PeftModel.from_pretrained)"
    )


def _ranges(config: Any) -> list[list[int]]:  # noqa: ANN401
    """The field ``layer_replication`` of a configuration as JSON has it."""
    return [list(pair) for pair in getattr(config, "layer_replication", None) or []]


def _layers(parts: Parts) -> dict[str, Any]:
    """Name → LoRA layer, by the names that the base model has for them."""
    from peft.tuners.lora import LoraLayer

    return {n.removeprefix(PREFIX): m for n, m in parts if isinstance(m, LoraLayer)}


def config_of(model: nn.Module, parts: Parts, name: str, *, runs: bool) -> Config:
    """The configuration of an adapter as PEFT would save it, true of the layers as they are.

    Ranks and alphas are those of the layers: hotswapping changes them, and not the configuration.

    Args:
        model: The model.
        parts: Its modules.
        name: Name of an adapter that it holds.
        runs: Whether its scaling is the one that it runs with, as `runs_as_its_own` finds.

    Returns:
        The configuration, by which every layer of the adapter has its rank and scaling.

    Raises:
        UnsupportedError: If the adapter has trained biases of the base model.
    """
    import peft

    given = adapters_of(model)[name].to_dict()
    if given.get("bias", "none") != "none":
        raise UnsupportedError(
            f"it trains biases of the base model itself (bias={given['bias']!r}), which all "
            "adapters in memory share; save it (save_pretrained) and read the files"
        )
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in given.items()}
    config = {"peft_version": peft.__version__, **config}
    if replicated := replication_of(model):  # the names are those of the layers as they are now
        config["layer_replication"] = replicated
    layers = _layers(parts)
    found = _ranks(layers, name, runs=runs)
    if any(rank_and_scaling(config, n) != at for n, at in found.items()):
        ranks, ranks_of = rank_pattern({n: rank for n, (rank, _) in found.items()})
        alphas, alphas_of = rank_pattern({n: rank * s for n, (rank, s) in found.items()})
        patterns = {"rank_pattern": ranks_of, "alpha_pattern": alphas_of}
        config |= {"r": ranks, "lora_alpha": alphas, "use_rslora": False, **patterns}
    modules = list(_ranks({n: m for n, m in layers.items() if not _is_parameter(m)}, name))
    if any(not targets(config, n) for n in modules):
        config |= exact_targets(modules)
    return config


def _ranks(
    layers: Mapping[str, Any], name: str, *, runs: bool = False
) -> dict[str, tuple[int, float]]:
    """Name by which PEFT looks a layer or parameter up → its rank and scaling of an adapter."""
    from peft.tuners.lora.layer import MultiheadAttention

    attentions = {n for n, layer in layers.items() if isinstance(layer, MultiheadAttention)}
    ranks = {}
    for n, layer in layers.items():
        at = _rank(layer, name, runs=runs)
        if at is not None:
            known = lookup_name(n, attentions)
            ranks[f"{known}.{layer.parameter_name}" if _is_parameter(layer) else known] = at
    return ranks


def _is_parameter(layer: object) -> bool:
    """Whether a layer adapts a parameter of a module and not the module."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def _rank(layer: Any, name: str, *, runs: bool = False) -> tuple[int, float] | None:  # noqa: ANN401
    """Rank and scaling of an adapter in a layer, of each expert; None if it is not there."""
    A = layer.lora_embedding_A if name in layer.lora_embedding_A else layer.lora_A
    if name not in A:
        return None
    factor = A[name] if isinstance(A, nn.ParameterDict) else A[name].weight
    experts = getattr(layer, "num_experts", 1)
    return factor.shape[0] // experts, scaling_of(layer, name, runs=runs)


class _Place(NamedTuple):
    """Where a tensor of an adapter is: in which module, under which name, and for which layer."""

    holder: nn.Module
    name: str
    layer: Any


def tensors_of(parts: Parts, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, under the keys that PEFT saves them with.

    Args:
        parts: The modules of a model.
        name: Name of an adapter that it holds.

    Returns:
        Key → a copy of the tensor.
    """
    return {key: _value(place).detach().clone() for key, place in _places(parts, name).items()}


def _places(parts: Parts, name: str) -> dict[str, _Place]:
    """Key that PEFT saves a tensor of an adapter with → where it is."""
    from peft.tuners.lora import LoraLayer

    places: dict[str, _Place] = {}
    for at, layer in parts:
        key = PREFIX + at.removeprefix(PREFIX)
        if isinstance(layer, LoraLayer):
            held = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
            for kind, factors in held.items():
                if name in factors and isinstance(factors, nn.ParameterDict):
                    places[f"{key}.{kind}"] = _Place(factors, name, layer)
                elif name in factors:
                    own = factors[name]
                    for n, _ in own.named_parameters():
                        places[f"{key}.{kind}.{n}"] = _Place(own, n, layer)
        elif is_wrapper(layer) and name in layer._adapters:
            state = layer.state_dict(keep_vars=True)
            names = {id(tensor): at for at, tensor in state.items()}
            for own, tensor in layer.adapter_state_dict(name, state).items():
                path, _, last = names[id(tensor)].rpartition(".")
                places[f"{key}.{own}"] = _Place(layer.get_submodule(path), last, layer)
    return places


def _value(place: _Place) -> Tensor:
    """A tensor of a model; where accelerate has offloaded it, from where it has been put."""
    tensor: Tensor = getattr(place.holder, place.name)
    if not tensor.is_meta:
        return tensor
    from accelerate.utils import align_module_device

    with align_module_device(place.holder):
        tensor = getattr(place.holder, place.name).clone()
    if tensor.is_meta:
        raise IncompatibleError("its tensors are not in memory (meta); load them first")
    return tensor


def put(model: nn.Module, name: str, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter to a model.

    Args:
        model: The model.
        name: Name of the new adapter.
        config: Its configuration.
        tensors: Its tensors, under the keys that PEFT saves them with. The model keeps them.

    Raises:
        OutputError: If the model does not take all of it as it is.
    """
    try:
        _inject(model, name, config)
        parts = list(walk(model))
        places = _places(parts, name)
        _assign(places, tensors)
        _follow_mode(_layers(parts), name)
        _require_same(places, tensors)
        _require_scalings(_layers(parts), name, config)
    except Exception as error:
        raise OutputError(f"{type(model).__name__} does not take it: {error}") from error


def remove(model: Any, name: str) -> None:  # noqa: ANN401
    """Take an adapter, or what there is of it, out of a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for _, module in walk(model):
        if isinstance(module, BaseTunerLayer):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is active now
                module.delete_adapter(name)
        elif is_wrapper(module) and name in module._adapters:
            module.delete_adapter(name, new_active_adapters=[])
    getattr(model, "peft_config", {}).pop(name, None)


def _inject(model: Any, name: str, config: Config) -> None:  # noqa: ANN401
    """Make the layers of an adapter, their tensors without memory."""
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type"}
    made = LoraConfig(**{key: value for key, value in config.items() if key in fields})
    made.inference_mode = True
    # PEFT would replicate the layers of a model again that are replicated
    replication, made.layer_replication = made.layer_replication, None
    if isinstance(model, PeftModel):
        # the classes for tasks would give it a classifier, too, that is not its own
        PeftModel.add_adapter(
            model, name, made, low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # as is meant here
            inject_adapter_in_model(made, model, adapter_name=name, low_cpu_mem_usage=True)
        if hasattr(model, "_hf_peft_config_loaded"):  # else diffusers takes it for unadapted
            model._hf_peft_config_loaded = True
    made.layer_replication = replication


def _assign(places: Mapping[str, _Place], tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter its tensors, each in its own type and where its layer computes.

    PEFT's own loader would cast them to the type of the base weight: of float32 magnitudes in a
    bfloat16 model that is more than many adapters change.

    Raises:
        FormatError: If the model has other places than there are tensors.
    """
    wanted = {_key(key): tensor for key, tensor in tensors.items()}
    if wanted.keys() != {_key(key) for key in places}:
        lacking = sorted(wanted.keys() - {_key(key) for key in places})
        empty = sorted({_key(key) for key in places} - wanted.keys())
        reasons = [f"it has no place for {listed(lacking)}"] if lacking else []
        if empty:
            reasons.append(f"its layers want {listed(empty)}, which the adapter does not have")
        raise FormatError("; ".join(reasons))
    for key, place in places.items():
        meant, there = wanted[_key(key)], getattr(place.holder, place.name)
        if there.shape != meant.shape:
            raise FormatError(f"{key!r} has shape {tuple(meant.shape)}, not {tuple(there.shape)}")
        made = meant.detach().to(_device(place.layer))
        if isinstance(there, nn.Parameter):
            made = nn.Parameter(made, requires_grad=False)
        setattr(place.holder, place.name, made)


def _key(key: str) -> str:
    """A key with magnitudes under one name; PEFT takes them under two."""
    return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE_VECTOR}.weight") else key


def _device(layer: Any) -> torch.device:  # noqa: ANN401
    """Where the weight of an adapted layer lies, or is computed with where it is offloaded."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    places: list[torch.device] = [t.device for t in (*base.parameters(), *base.buffers())]
    for place in places:
        if place.type != "meta":
            return place
    offloaded = getattr(base, "_hf_hook", None)
    where: torch.device | str | int | None = getattr(offloaded, "execution_device", None)
    return torch.device("cpu" if where is None else where)


def _follow_mode(layers: Mapping[str, Any], name: str) -> None:
    """Train or evaluate as the model does; new layers would drop inputs out in evaluation, too."""
    for layer in layers.values():
        training = layer.get_base_layer().training
        if layer.training != training:  # one that there was not before
            layer.train(training)
        for parts in layer.children():
            if isinstance(parts, nn.ModuleDict) and name in parts:
                parts[name].train(training)


def _require_same(places: Mapping[str, _Place], tensors: Mapping[str, Tensor]) -> None:
    """Compare what the model holds now with what was meant; hosts drop things quietly."""
    held = {_key(key): _value(place) for key, place in places.items()}
    wrong = []
    for key, tensor in tensors.items():
        found = held[_key(key)]
        alike = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if not alike or not (_at(found) == _at(tensor) or torch.equal(found.to(tensor), tensor)):
            wrong.append(key)
    if wrong:
        raise FormatError(f"it holds something else than was given for {listed(wrong)}")


def _at(tensor: Tensor) -> tuple[torch.device, int, tuple[int, ...]]:
    """Where the memory of a tensor is."""
    return tensor.device, tensor.data_ptr(), tensor.stride()


def _require_scalings(layers: Mapping[str, Any], name: str, config: Config) -> None:
    """Check that the layers have the ranks and scalings that the configuration gives them."""
    found = _ranks(layers, name)
    wrong = [m for m, at in found.items() if at != rank_and_scaling(config, m)]
    if wrong:
        raise FormatError(f"it gives other ranks or scalings to {listed(wrong)}")
