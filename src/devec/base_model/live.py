"""Base models in memory: of transformers, of diffusers, with adapters in them or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devec.base_model.layers import Layer, Model, Models, models_of_pipeline
from devec.errors import IncompatibleError, UnsupportedError
from devec.naming.module_id import DENOISER

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


_loading = Lock()


def is_live(base: object) -> bool:
    """Whether an object is a model, or a pipeline of models."""
    return isinstance(base, nn.Module) or isinstance(getattr(base, "components", None), Mapping)


def label(base: object) -> str:
    """A name for a live model that no other has while it lives, the same with adapters on it."""
    base = _without_adapters(base)
    return f"{type(base).__name__} in memory at {id(base):#x}"


def live_models(base: object) -> Models:
    """The models in a live object.

    Args:
        base: A model or a pipeline.

    Returns:
        Component → what opens it; a single model is listed as a denoiser, whatever it is.
    """
    if isinstance(base, nn.Module):
        return {DENOISER: cache(partial(live_model, base))}
    held = {
        slot: model
        for slot, model in getattr(base, "components", {}).items()
        if isinstance(model, nn.Module)
    }
    classes = {slot: type(_without_adapters(model)).__name__ for slot, model in held.items()}
    return models_of_pipeline(
        classes, type(base).__name__, lambda slot: cache(partial(live_model, held[slot]))
    )


def _without_adapters(base: Any) -> Any:  # noqa: ANN401
    """The model inside of PEFT's wrappers."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    base = getattr(base, "_orig_mod", base)  # of torch.compile
    if isinstance(base, PeftModel | PeftMixedModel):
        base = base.base_model
    return base.model if isinstance(base, BaseTuner) else base


def live_model(base: nn.Module) -> Model:
    """A live model by the names of its layers, those of adapters left out.

    Args:
        base: The model.

    Returns:
        The model; weights are taken from it when they are read.
    """
    changed_by = _changed_by(base)
    layers = {
        found.name: Layer(
            _shape(found.module), partial(_load, found, changed_by), _is_transposed(found.module)
        )
        for found in _layers("", _without_adapters(base), ())
        if found.name and _has_weight(found.module)
    }
    return Model(label(base), layers)


class _Found(NamedTuple):
    """A layer of a live model, and what PEFT has put around it."""

    name: str
    module: nn.Module
    wrappers: tuple[Any, ...]


def _layers(name: str, module: Any, wrappers: tuple[Any, ...]) -> Iterator[_Found]:  # noqa: ANN401
    """All layers, by the names they have without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        wrappers = (*wrappers, module)
        whole = isinstance(module, AuxiliaryTrainingWrapper)
        module = module.original_module if whole else module.base_layer
    yield _Found(name, module, wrappers)
    for child, inner in module.named_children():
        yield from _layers(f"{name}.{child}" if name else child, inner, wrappers)


def _is_quantised(module: Any) -> bool:  # noqa: ANN401
    """Whether the weight of a layer is kept in a form of which PEFT makes a tensor."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return weight.quant_state is not None
    if kind == "Int8Params":
        return not weight.is_floating_point()
    return hasattr(module, "W_q") or type(weight).__module__.startswith("torchao.")


def _has_weight(module: Any) -> bool:  # noqa: ANN401
    """Whether a layer has a weight that an adapter can change, in whatever form."""
    weight = getattr(module, "weight", None)
    packed = _is_quantised(module) or hasattr(module, "qweight")
    return packed or (isinstance(weight, Tensor) and weight.ndim > 1)


def _shape(module: Any) -> tuple[int, int]:  # noqa: ANN401
    """The shape of a layer's weight; a quantised one is stored in another."""
    if _is_quantised(module) or hasattr(module, "qweight"):
        return module.out_features, module.in_features
    return module.weight.shape[0], module.weight.shape[1:].numel()


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether a layer of this class stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D | nn.Embedding):
        return True
    return False if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _changed_by(base: nn.Module) -> str:
    """The adapter whose initialisation has changed the base weights, empty if there is none."""
    configs: dict[str, Any] = {}
    for holder in (base, _without_adapters(base)):
        held = getattr(holder, "peft_config", None)
        configs |= held if isinstance(held, dict) else {}
    inits = {name: str(getattr(c, "init_lora_weights", True)) for name, c in configs.items()}
    return next((f"{n!r} ({init})" for n, init in inits.items() if not is_plain_init(init)), "")


def _load(found: _Found, changed_by: str) -> Tensor:
    """The weight of a layer; one at a time, as some are changed and put back meanwhile."""
    with _loading:
        return _weight(found, changed_by)


def _weight(found: _Found, changed_by: str) -> Tensor:
    """The weight of a layer as the model computes with it now."""
    from peft.utils.integrations import dequantize_module_weight

    name, module = found.name, found.module
    if found.wrappers and changed_by:
        raise IncompatibleError(
            f"the adapter {changed_by} changed the weight of layer {name!r} when it was made, so "
            "that it is not that of the base model; load the base model without the adapter"
        )
    merged = [name for wrapper in found.wrappers for name in wrapper.merged_adapters]
    if merged:
        raise IncompatibleError(
            f"the adapter {merged[0]!r} is merged into layer {name!r} of the loaded model, so its "
            "weight is not that of the base model; take it out first (unmerge_adapter(), "
            "unfuse_lora())"
        )
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return _offloaded(name, module)
    if _is_quantised(module):
        weight: Any = module.weight
        with torch.no_grad():
            dequantised: Tensor = dequantize_module_weight(module)
        module.weight = weight  # PEFT may leave a copy, which on a CPU no longer computes
        return dequantised.detach()
    weight = getattr(module, "weight", None)
    eight_bits = isinstance(weight, Tensor) and weight.dtype in _EIGHT_BITS
    scaled = eight_bits and any("scale" in key for key in module.state_dict())
    if not isinstance(weight, Tensor) or scaled:
        raise UnsupportedError(
            f"layer {name!r} of the loaded model ({type(module).__name__}) is quantised in a way "
            "that PEFT cannot undo; load the model without quantisation"
        )
    return weight.detach()


def _offloaded(name: str, module: nn.Module) -> Tensor:
    """The weight of a layer that accelerate has put elsewhere."""
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
    """Whether an initialisation leaves the base weight what it was."""
    return init.lower() in _PLAIN_INITS


# Initialisations under which the base weight stays what it was, so that B·A is the whole change.
_PLAIN_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "mica", "none")
