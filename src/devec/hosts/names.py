"""Names of adapters in live models, which PEFT writes into the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from devec.errors import IncompatibleError, listed
from devec.hosts.layers import walk

_PREFIX = "lora_"
# PEFT's own, in the layers that hold adapters
_OWN = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def require_names(names: Sequence[str], models: Iterable[nn.Module], taken: Iterable[str]) -> None:
    """Check names for new adapters, before anything is computed.

    Args:
        names: The names.
        models: The models that are to hold them.
        taken: Names of the adapters that they hold already.

    Raises:
        IncompatibleError: If one is taken, given twice, or would be mistaken for something else.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise IncompatibleError(f"the name of an adapter is a string, not empty; got {name!r}")
    held = list(taken)
    clash = [name for name in names if name in held]
    if clash:
        raise IncompatibleError(
            f"the model has {listed(clash)} already, and no adapter is replaced; delete what is "
            "there (delete_adapter, delete_adapters) or choose another name"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise IncompatibleError(f"two adapters would be named {listed(twice)}; rename one")
    _require_readable(names, models)


def _require_readable(names: Sequence[str], models: Iterable[nn.Module]) -> None:
    """Refuse names that cannot be told from the other parts of a parameter's name."""
    own = (nn.ModuleDict(), nn.ParameterDict())
    attributes = [name for name in names if any(hasattr(part, name) for part in own)]
    if attributes:
        raise IncompatibleError(
            f"PEFT keeps adapters in modules of torch, which have attributes of their own named "
            f"{listed(attributes)}; choose another name"
        )
    dotted = [name for name in names if "." in name]
    if dotted:
        raise IncompatibleError(
            f"PEFT takes no name with a dot, got {listed(dotted)}; choose another name"
        )
    if "__base__" in names:
        raise IncompatibleError("'__base__' is PEFT's name for no adapter; choose another name")
    contained = [name for name in names if name in _PREFIX]
    if contained:
        raise IncompatibleError(
            f"PEFT takes no name that is a part of {_PREFIX!r}, got {listed(contained)}; choose "
            "another name"
        )
    for model in models:
        parts = _parts(model)
        same = [name for name in names if name in parts]
        if same:
            raise IncompatibleError(
                f"{type(model).__name__} has modules or parameters named {listed(same)}, of which "
                "PEFT could not tell an adapter; choose another name"
            )


def _parts(model: nn.Module) -> set[str]:
    """The parts of all names in a model, but for those that are names of adapters."""
    parts = {"weight", "bias", *_OWN}
    for name, module in walk(model):
        parts.update(name.split("."))
        parts.update(own for own, _ in module.named_parameters(recurse=False))
    return parts
