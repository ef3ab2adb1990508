"""What PEFT has wrapped around the layers of a live model, and keeping it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Parts = Sequence[tuple[str, Any]]  # what `walk` finds


def is_wrapper(module: object) -> bool:
    """Whether a module is one that PEFT has put around another, for adapters or whole copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def inside(wrapper: Any) -> tuple[str, nn.Module]:  # noqa: ANN401
    """What a wrapper calls the module that it is around, and the module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = "base_layer" if isinstance(wrapper, BaseTunerLayer) else "original_module"
    return name, getattr(wrapper, name)


def walk(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules of a model but the insides of adapters, PEFT's wrappers among them.

    Args:
        model: The model.

    Yields:
        Name, as the model has it, and module.
    """
    left: list[tuple[str, Any]] = [("", model)]
    while left:
        name, module = left.pop()
        yield name, module
        parts = [inside(module)] if is_wrapper(module) else list(module.named_children())
        left += [(f"{name}.{child}" if name else child, part) for child, part in reversed(parts)]


def has_merged(parts: Parts) -> str:
    """The name of an adapter that is merged into the weights of a model, empty if none is."""
    merged = (module.merged_adapters for _, module in parts if is_wrapper(module))
    return next((names[0] for names in merged if names), "")


@contextmanager
def otherwise_unchanged(model: nn.Module) -> Iterator[None]:
    """Keep what is active and trainable in a model, whatever is added to it meanwhile.

    PEFT's calls switch other adapters on and off when one is added, and a host may have set a
    wrapper and the layer inside it differently; so each module's own state is restored, and no
    call of PEFT is used for it.

    Where adding fails, layers that were not wrapped before are so no more, and the model says no
    more of adapters than it did.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    before = {id(module): (module, _state(module)) for module in model.modules()}
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
                module.training = inside(module)[1].training
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


_ABSENT = object()
# What a model says of adapters: their configurations, and for some hosts whether it has any.
_RECORDS = ("peft_config", "_hf_peft_config_loaded")
# What a wrapper, or a model of PEFT, says of the adapters that are active in it.
_STATE = ("_active_adapter", "active_adapter", "_disable_adapters", "training")


def _state(module: nn.Module) -> dict[str, Any]:
    """What is active in a module, if it says so, and its mode, as its own attributes."""
    own = {key: module.__dict__[key] for key in _STATE if key in module.__dict__}
    return {key: list(v) if isinstance(v, list) else v for key, v in own.items()}


def _is_tuner(module: nn.Module) -> bool:
    """Whether a wrapper holds adapters' factors, of which several may be active."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def _active(model: nn.Module) -> tuple[Sequence[str], bool]:
    """The adapters that are active in the layers of a model, and whether all are disabled."""
    layers: list[Any] = [module for module in model.modules() if _is_tuner(module)]
    active = layers[0].active_adapters if layers else []
    return list(active), any(layer.disable_adapters for layer in layers)


def _restore_records(model: nn.Module, records: Mapping[str, object]) -> None:
    """Let a model say of adapters what it did."""
    for key, value in records.items():
        if value is not _ABSENT:
            setattr(model, key, value)
        elif key in model.__dict__:
            delattr(model, key)


def _unwrap(model: nn.Module, known: Mapping[int, object]) -> None:
    """Put the modules back of which the wrappers are not known, the innermost first."""
    for name, module in reversed(list(walk(model))):
        if is_wrapper(module) and id(module) not in known:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, inside(module)[1])


def offload_again(model: nn.Module) -> None:
    """Make new layers part of what diffusers offloads in groups, as its own loader does."""
    if any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        from diffusers.hooks import group_offloading

        group_offloading._maybe_remove_and_reapply_group_offloading(model)
