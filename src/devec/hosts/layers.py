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


def _inside(wrapper: Any) -> tuple[str, nn.Module]:  # noqa: ANN401
    """The module that a wrapper is around, and what it is called there."""
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
        inside = [_inside(module)] if is_wrapper(module) else list(module.named_children())
        left += [(f"{name}.{child}" if name else child, part) for child, part in reversed(inside)]


def has_merged(parts: Parts) -> str:
    """The name of an adapter that is merged into the weights of a model, empty if none is."""
    merged = (module.merged_adapters for _, module in parts if is_wrapper(module))
    return next((names[0] for names in merged if names), "")


@contextmanager
def otherwise_unchanged(model: nn.Module) -> Iterator[None]:
    """Keep what is active and trainable in a model, whatever is added to it meanwhile.

    Where adding fails, layers that were not wrapped before are so no more.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers = _wrappers(model)
    before = {id(m): (list(m.active_adapters), m.disable_adapters) for m in wrappers}
    layers = [before[id(m)] for m in wrappers if isinstance(m, BaseTunerLayer)]
    active = layers[0][0] if layers else []
    disabled = any(off for _, off in layers)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        _unwrap(model, before)
        raise
    finally:
        for module in _wrappers(model):
            new = active if isinstance(module, BaseTunerLayer) else []
            names, off = before.get(id(module), (new, disabled))
            if list(module.active_adapters) != names:
                module.set_adapter(names)
            if module.disable_adapters != off:
                module.enable_adapters(enabled=not off)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _wrappers(model: nn.Module) -> list[Any]:
    """All wrappers in a model."""
    return [module for _, module in walk(model) if is_wrapper(module)]


def _unwrap(model: nn.Module, known: Mapping[int, object]) -> None:
    """Put the modules back of which the wrappers are not known, the innermost first."""
    for name, module in reversed(list(walk(model))):
        if is_wrapper(module) and id(module) not in known:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _inside(module)[1])


def offload_again(model: nn.Module) -> None:
    """Make new layers part of what diffusers offloads in groups, as its own loader does."""
    if any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        from diffusers.hooks import group_offloading

        group_offloading._maybe_remove_and_reapply_group_offloading(model)
