"""Names of new adapters in live models, which PEFT writes into the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from devec.errors import IncompatibleError, listed
from devec.hosts.layers import walk

_LORA_PREFIX = "lora_"
# The attributes of PEFT's layers that hold the tensors of adapters.
_LORA_ATTRIBUTES = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def require_new_names(
    names: Sequence[str], models: Iterable[nn.Module], in_use: Iterable[str]
) -> None:
    """Refuse names that are in use, repeated, or ambiguous in a parameter's name."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise IncompatibleError(f"the name of an adapter is a string, not empty; got {name!r}")
    existing = list(in_use)
    clashes = [name for name in names if name in existing]
    if clashes:
        raise IncompatibleError(
            f"the model has {listed(clashes)} already, and no adapter is replaced; delete the "
            "existing one (delete_adapter, delete_adapters) or choose another name"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise IncompatibleError(f"two adapters would be named {listed(repeated)}; rename one")
    _require_unambiguous(names, models)


def _require_unambiguous(names: Sequence[str], models: Iterable[nn.Module]) -> None:
    """Refuse names that cannot be told from other segments of a parameter's name."""
    containers = (nn.ModuleDict(), nn.ParameterDict())
    attributes = [name for name in names if any(hasattr(c, name) for c in containers)]
    if attributes:
        raise IncompatibleError(
            f"PEFT keeps adapters in modules of torch, which have attributes of their own named "
            f"{listed(attributes)}; choose another name"
        )
    dotted = [name for name in names if "." in name]
    if dotted:
        raise IncompatibleError(
            f"PEFT accepts no name with a dot, got {listed(dotted)}; choose another name"
        )
    if "__base__" in names:
        raise IncompatibleError("'__base__' is PEFT's name for no adapter; choose another name")
    contained = [name for name in names if name in _LORA_PREFIX]
    if contained:
        raise IncompatibleError(
            f"PEFT accepts no name that is a part of {_LORA_PREFIX!r}, got {listed(contained)}; "
            "choose another name"
        )
    for model in models:
        segments = _name_segments(model)
        ambiguous = [name for name in names if name in segments]
        if ambiguous:
            raise IncompatibleError(
                f"{type(model).__name__} has modules or parameters named {listed(ambiguous)}, from "
                "which PEFT could not tell an adapter; choose another name"
            )


def _name_segments(model: nn.Module) -> set[str]:
    """The segments of all module and parameter names in a model, except names of adapters."""
    segments = {"weight", "bias", *_LORA_ATTRIBUTES}
    for name, module in walk(model):
        segments.update(name.split("."))
        segments.update(parameter for parameter, _ in module.named_parameters(recurse=False))
    return segments
