"""PEFT's wrappers around the layers of a live model, and preserving their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

NamedModules = Sequence[tuple[str, Any]]  # the modules that `walk` yields


def is_wrapper(module: object) -> bool:
    """Whether a module is a wrapper of PEFT's, for adapters or for whole trained copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def wrapped(wrapper: Any) -> tuple[str, nn.Module]:  # noqa: ANN401
    """The module inside a wrapper, and the name of the attribute that holds it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = "base_layer" if isinstance(wrapper, BaseTunerLayer) else "original_module"
    return name, getattr(wrapper, name)


def walk(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules of a model with their names: wrappers and what they wrap, but not adapters."""
    pending: list[tuple[str, Any]] = [("", model)]
    while pending:
        name, module = pending.pop()
        yield name, module
        children = [wrapped(module)] if is_wrapper(module) else list(module.named_children())
        pending += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children)]


def merged_adapter(modules: NamedModules) -> str:
    """The name of an adapter that is merged into the weights of a model, empty if none is."""
    merged = (module.merged_adapters for _, module in modules if is_wrapper(module))
    return next((names[0] for names in merged if names), "")


@contextmanager
def state_preserved(model: nn.Module) -> Iterator[None]:
    """Restore which adapters are active and which parameters are trainable; on errors, unwrap, too.

    PEFT changes which adapters are active when one is added, and a host may have set a wrapper and
    the layer inside it differently. So the state of each module is restored, without PEFT's calls.
    """
    before = {id(module): (module, _mode(module)) for module in model.modules()}
    records = {key: model.__dict__.get(key, _ABSENT) for key in _RECORDS}
    active, disabled = _active(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        _unwrap(model, before)
        _restore_records(model, records)
        raise
    finally:
        modules: list[Any] = list(model.modules())
        for module in modules:
            if id(module) in before:
                module.__dict__.update(before[id(module)][1])
            elif is_wrapper(module):
                module._active_adapter = list(active) if _is_tuner(module) else []
                module._disable_adapters = disabled
                module.training = wrapped(module)[1].training
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


_ABSENT = object()
# Attributes of a model that record its adapters: their configurations, and whether it has any.
_RECORDS = ("peft_config", "_hf_peft_config_loaded")
# Attributes of wrappers and of PEFT's models that record the active adapters, and the mode.
_MODE = ("_active_adapter", "active_adapter", "_disable_adapters", "training")


def _mode(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that record its active adapters and its mode, lists copied."""
    own = {key: module.__dict__[key] for key in _MODE if key in module.__dict__}
    return {key: list(v) if isinstance(v, list) else v for key, v in own.items()}


def _is_tuner(module: nn.Module) -> bool:
    """Whether a wrapper holds the factors of adapters, several of which may be active."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def _active(model: nn.Module) -> tuple[Sequence[str], bool]:
    """The adapters that are active in the layers of a model, and whether adapters are disabled."""
    layers: list[Any] = [module for module in model.modules() if _is_tuner(module)]
    active = layers[0].active_adapters if layers else []
    return list(active), any(layer.disable_adapters for layer in layers)


def _restore_records(model: nn.Module, records: Mapping[str, object]) -> None:
    """Restore the attributes of a model that record its adapters."""
    for key, value in records.items():
        if value is not _ABSENT:
            setattr(model, key, value)
        elif key in model.__dict__:
            delattr(model, key)


def _unwrap(model: nn.Module, known: Mapping[int, object]) -> None:
    """Remove the wrappers that are not among the known modules, innermost first."""
    for name, module in reversed(list(walk(model))):
        if is_wrapper(module) and id(module) not in known:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, wrapped(module)[1])


def offload_again(model: nn.Module) -> None:
    """Include new layers in the group offloading of diffusers, as its own loader does."""
    if any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        from diffusers.hooks import group_offloading

        group_offloading._maybe_remove_and_reapply_group_offloading(model)
