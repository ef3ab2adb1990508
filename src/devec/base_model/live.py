"""Base models in memory: of transformers or diffusers, with or without adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devec.base_model.layers import Layer, Model, ModelOpeners, models_of_pipeline
from devec.errors import IncompatibleError, UnsupportedError
from devec.files.safetensors_reader import FLOAT8_DTYPES
from devec.naming.module_id import DENOISER

# Held while a weight is read, as dequantising and loading may replace it for a moment.
_reading = Lock()


def is_live(base: object) -> bool:
    """Whether an object is a model or a pipeline of models."""
    return isinstance(base, nn.Module) or isinstance(getattr(base, "components", None), Mapping)


def live_source(base: object) -> str:
    """The identity of a live model, the same with and without adapters: class and address."""
    base = _without_adapters(base)
    return f"{type(base).__name__} in memory at {id(base):#x}"


def live_models(base: object) -> ModelOpeners:
    """Component → function that opens its model; a single model is listed as a denoiser."""
    if isinstance(base, nn.Module):
        return {DENOISER: cache(partial(live_model, base))}
    models = {
        slot: model
        for slot, model in getattr(base, "components", {}).items()
        if isinstance(model, nn.Module)
    }
    classes = {slot: type(_without_adapters(model)).__name__ for slot, model in models.items()}
    return models_of_pipeline(
        classes, type(base).__name__, lambda slot: cache(partial(live_model, models[slot]))
    )


def _without_adapters(base: Any) -> Any:  # noqa: ANN401
    """The model inside of a PEFT model, or the model itself."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    base = getattr(base, "_orig_mod", base)  # of torch.compile
    if isinstance(base, PeftModel | PeftMixedModel):
        base = base.base_model
    return base.model if isinstance(base, BaseTuner) else base


def live_model(base: nn.Module) -> Model:
    """The layers of a live model, without those of adapters; weights are read on access."""
    changed_by = _weight_changing_adapter(base)
    layers = {
        layer.name: Layer(
            _weight_shape(layer.module),
            partial(_read_weight, layer, changed_by),
            _is_transposed(layer.module),
        )
        for layer in _live_layers("", _without_adapters(base), ())
        if layer.name and _has_weight(layer.module)
    }
    return Model(live_source(base), layers)


class _LiveLayer(NamedTuple):
    """A layer of a live model, and PEFT's wrappers around it."""

    name: str
    module: nn.Module
    wrappers: tuple[Any, ...]


def _live_layers(name: str, module: Any, wrappers: tuple[Any, ...]) -> Iterator[_LiveLayer]:  # noqa: ANN401
    """All layers, with their names without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        wrappers = (*wrappers, module)
        has_copies = isinstance(module, AuxiliaryTrainingWrapper)
        module = module.original_module if has_copies else module.base_layer
    yield _LiveLayer(name, module, wrappers)
    for child, inner in module.named_children():
        yield from _live_layers(f"{name}.{child}" if name else child, inner, wrappers)


def _is_quantised(module: Any) -> bool:  # noqa: ANN401
    """Whether the weight of a layer is quantised in a way that PEFT can dequantise."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return weight.quant_state is not None
    if kind == "Int8Params":
        return not weight.is_floating_point()
    return hasattr(module, "W_q") or type(weight).__module__.startswith("torchao.")


def _has_weight(module: Any) -> bool:  # noqa: ANN401
    """Whether a layer has a weight that an adapter can change, quantised or not."""
    weight = getattr(module, "weight", None)
    packed = _is_quantised(module) or hasattr(module, "qweight")
    return packed or (isinstance(weight, Tensor) and weight.ndim > 1)


def _weight_shape(module: Any) -> tuple[int, int]:  # noqa: ANN401
    """The shape (out, in) of the weight of a layer, also if it is quantised."""
    if _is_quantised(module) or hasattr(module, "qweight"):
        return module.out_features, module.in_features
    return module.weight.shape[0], module.weight.shape[1:].numel()


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether a layer of this class stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D | nn.Embedding):
        return True
    return False if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _weight_changing_adapter(base: nn.Module) -> str:
    """An adapter whose initialisation changed the base weights, for messages; or empty."""
    configs: dict[str, Any] = {}
    for holder in (base, _without_adapters(base)):
        own = getattr(holder, "peft_config", None)
        configs |= own if isinstance(own, dict) else {}
    inits = {name: str(getattr(c, "init_lora_weights", True)) for name, c in configs.items()}
    return next((f"{n!r} ({init})" for n, init in inits.items() if not is_plain_init(init)), "")


def _read_weight(layer: _LiveLayer, changed_by: str) -> Tensor:
    """The base weight of a layer; threads wait for each other."""
    with _reading:
        return _base_weight(layer, changed_by)


def _base_weight(layer: _LiveLayer, changed_by: str) -> Tensor:
    """The base weight of a layer, loaded and dequantised if needed; refused if it was changed."""
    from peft.utils.integrations import dequantize_module_weight

    name, module = layer.name, layer.module
    if layer.wrappers and changed_by:
        raise IncompatibleError(
            f"the adapter {changed_by} changed the weight of layer {name!r} when it was created, "
            "so it is not that of the base model; load the base model without the adapter"
        )
    merged = [adapter for wrapper in layer.wrappers for adapter in wrapper.merged_adapters]
    if merged:
        raise IncompatibleError(
            f"the adapter {merged[0]!r} is merged into layer {name!r} of the loaded model, so its "
            "weight is not that of the base model; unmerge it first (unmerge_adapter(), "
            "unfuse_lora())"
        )
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return _offloaded(name, module)
    if _is_quantised(module):
        weight: Any = module.weight
        with torch.no_grad():
            dequantised: Tensor = dequantize_module_weight(module)
        module.weight = weight  # PEFT may replace it by a copy that cannot compute on a CPU
        return dequantised.detach()
    weight = getattr(module, "weight", None)
    is_float8 = isinstance(weight, Tensor) and weight.dtype in FLOAT8_DTYPES
    scaled = is_float8 and any("scale" in key for key in module.state_dict())
    if not isinstance(weight, Tensor) or scaled:
        raise UnsupportedError(
            f"layer {name!r} of the loaded model ({type(module).__name__}) is quantised in a way "
            "that PEFT cannot undo; load the model without quantisation"
        )
    return weight.detach()


def _offloaded(name: str, module: nn.Module) -> Tensor:
    """The weight of a layer that accelerate has offloaded."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        weight: Any = module.weight
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            return weight.detach().clone()
    raise UnsupportedError(
        f"the weight of layer {name!r} of the loaded model is not in memory (offloaded); load the "
        "model without offloading, or give the path of its files"
    )


def is_plain_init(init: str) -> bool:
    """Whether an initialisation of LoRA leaves the base weight unchanged."""
    return init.lower() in _PLAIN_INITS


# Initialisations that do not change the base weight, so that the delta is B·A alone.
_PLAIN_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "mica", "none")
