"""Reading and adding one adapter of one live model: its configuration and tensors, as PEFT's."""

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
from devec.hosts.layers import NamedModules, is_wrapper, walk
from devec.hosts.scaling import scaling_of
from devec.naming.conventions import MAGNITUDE_VECTOR


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Name → configuration of the adapters that a model lists."""
    return dict(getattr(model, "peft_config", None) or {})


def replication_of(model: nn.Module) -> list[list[int]] | None:
    """The ``layer_replication`` of the adapters of a model, None if no layer was replicated."""
    replications = [_replication(config) for config in adapters_of(model).values()]
    replications = [ranges for ranges in replications if ranges]
    if any(ranges != replications[0] for ranges in replications):
        raise UnsupportedError(
            f"the layers of {type(model).__name__} were replicated for one adapter and again for "
            f"another (layer_replication {listed([str(r) for r in replications])}), so the names "
            "of layers are ambiguous; load each of the adapters into a model of its own"
        )
    return replications[0] if replications else None


def require_same_replication(model: nn.Module, config: Config) -> None:
    """Refuse an adapter whose ``layer_replication`` is not that of the model."""
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


def _replication(config: Any) -> list[list[int]]:  # noqa: ANN401
    """The field ``layer_replication`` of a configuration, as in JSON."""
    return [list(pair) for pair in getattr(config, "layer_replication", None) or []]


def _lora_layers(modules: NamedModules) -> dict[str, Any]:
    """Name in the base model → LoRA layer."""
    from peft.tuners.lora import LoraLayer

    return {n.removeprefix(PREFIX): m for n, m in modules if isinstance(m, LoraLayer)}


def config_of(
    model: nn.Module, modules: NamedModules, name: str, *, current_scaling: bool
) -> Config:
    """The configuration of an adapter as PEFT would save it, with the ranks of its layers.

    Hotswapping changes the ranks and scalings of layers, but not the configuration.

    Args:
        model: The model.
        modules: Its modules.
        name: Name of an adapter in the model.
        current_scaling: Whether to use the current scalings of the layers instead of alpha/r.

    Returns:
        The configuration; it gives every layer of the adapter its rank and scaling.

    Raises:
        UnsupportedError: If the adapter has trained biases of the base model.
    """
    import peft

    fields = adapters_of(model)[name].to_dict()
    if fields.get("bias", "none") != "none":
        raise UnsupportedError(
            f"it trains biases of the base model itself (bias={fields['bias']!r}), which all "
            "adapters in memory share; save it (save_pretrained) and read the files"
        )
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in fields.items()}
    config = {"peft_version": peft.__version__, **config}
    if replicated := replication_of(model):  # the names are those of the replicated layers
        config["layer_replication"] = replicated
    layers = _lora_layers(modules)
    actual = _ranks(layers, name, current_scaling=current_scaling)
    if any(rank_and_scaling(config, n) != of_layer for n, of_layer in actual.items()):
        rank, ranks = rank_pattern({n: r for n, (r, _) in actual.items()})
        alpha, alphas = rank_pattern({n: r * s for n, (r, s) in actual.items()})
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        config |= {"r": rank, "lora_alpha": alpha, "use_rslora": False, **patterns}
    targeted = list(_ranks({n: m for n, m in layers.items() if not _is_parameter(m)}, name))
    if any(not targets(config, n) for n in targeted):
        config |= exact_targets(targeted)
    return config


def _ranks(
    layers: Mapping[str, Any], name: str, *, current_scaling: bool = False
) -> dict[str, tuple[int, float]]:
    """Name by which PEFT looks up a layer or parameter → rank and scaling of an adapter in it."""
    from peft.tuners.lora.layer import MultiheadAttention

    attentions = {n for n, layer in layers.items() if isinstance(layer, MultiheadAttention)}
    ranks = {}
    for n, layer in layers.items():
        of_layer = _rank_and_scaling(layer, name, current=current_scaling)
        if of_layer is not None:
            key = lookup_name(n, attentions)
            ranks[f"{key}.{layer.parameter_name}" if _is_parameter(layer) else key] = of_layer
    return ranks


def _is_parameter(layer: object) -> bool:
    """Whether a layer adapts a parameter of a module rather than the module."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def _rank_and_scaling(layer: Any, name: str, *, current: bool) -> tuple[int, float] | None:  # noqa: ANN401
    """Rank (per expert) and scaling of an adapter in a layer, None if the layer has none of it."""
    A = layer.lora_embedding_A if name in layer.lora_embedding_A else layer.lora_A
    if name not in A:
        return None
    factor = A[name] if isinstance(A, nn.ParameterDict) else A[name].weight
    experts = getattr(layer, "num_experts", 1)
    return factor.shape[0] // experts, scaling_of(layer, name, current=current)


class _Location(NamedTuple):
    """The location of a tensor of an adapter in a model.

    Attributes:
        holder: The module that has the tensor as an attribute.
        name: Name of the attribute.
        layer: The layer that the tensor adapts.
    """

    holder: nn.Module
    name: str
    layer: Any


def tensors_of(modules: NamedModules, name: str) -> dict[str, Tensor]:
    """Key that PEFT saves a tensor of an adapter with → a copy of the tensor."""
    located = _locations(modules, name)
    return {key: _tensor(location).detach().clone() for key, location in located.items()}


def _locations(modules: NamedModules, name: str) -> dict[str, _Location]:
    """Key that PEFT saves a tensor of an adapter with → its location."""
    from peft.tuners.lora import LoraLayer

    locations: dict[str, _Location] = {}
    for module, layer in modules:
        key = PREFIX + module.removeprefix(PREFIX)
        if isinstance(layer, LoraLayer):
            # PEFT 0.19 lists the magnitudes of linear layers only
            kinds = (*layer.adapter_layer_names, MAGNITUDE_VECTOR.removeprefix("."))
            containers = {kind: getattr(layer, kind) for kind in kinds}
            for kind, container in containers.items():
                if name in container and isinstance(container, nn.ParameterDict):
                    locations[f"{key}.{kind}"] = _Location(container, name, layer)
                elif name in container:
                    holder = container[name]
                    for n, _ in holder.named_parameters():
                        locations[f"{key}.{kind}.{n}"] = _Location(holder, n, layer)
        elif is_wrapper(layer) and name in layer._adapters:
            state = layer.state_dict(keep_vars=True)
            names = {id(tensor): n for n, tensor in state.items()}
            for saved, tensor in layer.adapter_state_dict(name, state).items():
                path, _, last = names[id(tensor)].rpartition(".")
                locations[f"{key}.{saved}"] = _Location(layer.get_submodule(path), last, layer)
    return locations


def _tensor(location: _Location) -> Tensor:
    """The tensor at a location, loaded if accelerate has offloaded it."""
    tensor: Tensor = getattr(location.holder, location.name)
    if not tensor.is_meta:
        return tensor
    from accelerate.utils import align_module_device

    with align_module_device(location.holder):
        tensor = getattr(location.holder, location.name).clone()
    if tensor.is_meta:
        raise IncompatibleError("its tensors are not in memory (meta); load them first")
    return tensor


def add(model: nn.Module, name: str, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter to a model, and verify that the model holds it exactly.

    Args:
        model: The model.
        name: Name of the new adapter.
        config: Its configuration.
        tensors: Its tensors by the keys of PEFT; the model keeps them without a copy.

    Raises:
        OutputError: If the model rejects the adapter or does not hold it exactly.
    """
    try:
        _inject(model, name, config)
        modules = list(walk(model))
        locations, layers = _locations(modules, name), _lora_layers(modules)
        _assign(locations, tensors)
        _set_mode(layers, name)
        _require_assigned(locations, tensors)
        _require_scalings(layers, name, config)
    except Exception as error:
        raise OutputError(f"{type(model).__name__} does not accept it: {error}") from error


def remove(model: Any, name: str) -> None:  # noqa: ANN401
    """Remove an adapter, possibly added only in part, from a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for _, module in walk(model):
        if isinstance(module, BaseTunerLayer):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a new active adapter
                module.delete_adapter(name)
        elif is_wrapper(module) and name in module._adapters:
            module.delete_adapter(name, new_active_adapters=[])
    getattr(model, "peft_config", {}).pop(name, None)


def _inject(model: Any, name: str, config: Config) -> None:  # noqa: ANN401
    """Create the layers of an adapter, with tensors on the meta device."""
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type"}
    lora = LoraConfig(**{key: value for key, value in config.items() if key in fields})
    lora.inference_mode = True
    # PEFT would replicate layers again that are already replicated
    replication, lora.layer_replication = lora.layer_replication, None
    if isinstance(model, PeftModel):
        # the subclasses for tasks would also add a copy of the classifier
        PeftModel.add_adapter(
            model, name, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # expected here
            inject_adapter_in_model(lora, model, adapter_name=name, low_cpu_mem_usage=True)
        if hasattr(model, "_hf_peft_config_loaded"):  # diffusers checks it for adapters
            model._hf_peft_config_loaded = True
    lora.layer_replication = replication


def _assign(locations: Mapping[str, _Location], tensors: Mapping[str, Tensor]) -> None:
    """Assign the tensors of an adapter, in their own dtypes and on the devices of their layers."""
    # PEFT's own loader would cast them to the dtype of the base weight; for float32 magnitudes in a
    # bfloat16 model that loses more than many adapters change
    by_key = {_key(key): tensor for key, tensor in tensors.items()}
    if by_key.keys() != {_key(key) for key in locations}:
        unplaced = sorted(by_key.keys() - {_key(key) for key in locations})
        missing = sorted({_key(key) for key in locations} - by_key.keys())
        reasons = [f"it has no place for {listed(unplaced)}"] if unplaced else []
        if missing:
            reasons.append(f"its layers need {listed(missing)}, which the adapter does not have")
        raise FormatError("; ".join(reasons))
    for key, location in locations.items():
        given, empty = by_key[_key(key)], getattr(location.holder, location.name)
        if empty.shape != given.shape:
            raise FormatError(f"{key!r} has shape {tuple(given.shape)}, not {tuple(empty.shape)}")
        assigned = given.detach().to(_device(location.layer))
        if isinstance(empty, nn.Parameter):
            assigned = nn.Parameter(assigned, requires_grad=False)
        setattr(location.holder, location.name, assigned)


def _key(key: str) -> str:
    """A key with one spelling for magnitudes, for which PEFT has two."""
    return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE_VECTOR}.weight") else key


def _device(layer: Any) -> torch.device:  # noqa: ANN401
    """The device of the base weight of a layer, or its execution device if it is offloaded."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    devices: list[torch.device] = [t.device for t in (*base.parameters(), *base.buffers())]
    for device in devices:
        if device.type != "meta":
            return device
    hook = getattr(base, "_hf_hook", None)
    execution: torch.device | str | int | None = getattr(hook, "execution_device", None)
    return torch.device("cpu" if execution is None else execution)


def _set_mode(layers: Mapping[str, Any], name: str) -> None:
    """Set the training mode of new layers to that of the model, for the sake of dropout."""
    for layer in layers.values():
        training = layer.get_base_layer().training
        if layer.training != training:  # a new wrapper
            layer.train(training)
        for container in layer.children():
            if isinstance(container, nn.ModuleDict) and name in container:
                container[name].train(training)


def _require_assigned(locations: Mapping[str, _Location], tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors in the model with those that were assigned; some hosts drop tensors."""
    actual = {_key(key): _tensor(location) for key, location in locations.items()}
    wrong = [key for key, tensor in tensors.items() if not _is_same(actual[_key(key)], tensor)]
    if wrong:
        raise FormatError(f"it holds something else than was given for {listed(wrong)}")


def _is_same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one dtype and shape, and one memory or equal values."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    return _address(actual) == _address(expected) or torch.equal(actual.to(expected), expected)


def _address(tensor: Tensor) -> tuple[torch.device, int, tuple[int, ...]]:
    """The device, address and strides of the memory of a tensor."""
    return tensor.device, tensor.data_ptr(), tensor.stride()


def _require_scalings(layers: Mapping[str, Any], name: str, config: Config) -> None:
    """Check that the layers have the ranks and scalings of the configuration."""
    actual = _ranks(layers, name)
    wrong = [n for n, of_layer in actual.items() if of_layer != rank_and_scaling(config, n)]
    if wrong:
        raise FormatError(f"it gives other ranks or scalings to {listed(wrong)}")
