"""Names of layers inside PEFT's wrappers, and the names by which PEFT looks them up.

PEFT stores the layer that it wraps as ``base_layer``, so keys of layers inside a wrapper contain
that word. Targets and patterns are matched against the names in the base model. The projections of
nn.MultiheadAttention are one target, the attention itself, and share its rank and alpha.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PREFIX = "base_model.model."  # of all keys in PEFT's files
_WRAPPED = ".base_layer"
_OUT_PROJ = "out_proj"


def unwrapped(name: str) -> str:
    """The name of a layer in the base model, without PEFT's wrappers."""
    return name.replace(_WRAPPED, "")


def depth(name: str) -> int:
    """The number of wrappers outside the named one."""
    inner = name.removesuffix(_WRAPPED)
    return 0 if inner == name else 1 + depth(inner)


def attentions_in(names: Iterable[str], parameters: Collection[str]) -> set[str]:
    """Names of the modules that are nn.MultiheadAttention: they contain an adapted projection."""
    # a module inside a parameter may have the same name
    known = set(names)
    return {
        name for name in known.difference(parameters) if f"{name}{_WRAPPED}.{_OUT_PROJ}" in known
    }


def attention_of(name: str, attentions: Collection[str]) -> str:
    """The nn.MultiheadAttention that a layer is a projection of; empty if there is none."""
    owner = name.removesuffix(f"{_WRAPPED}.{_OUT_PROJ}")
    return owner if owner in attentions else ""


def unused_projection(attention: str) -> str:
    """The name of an output projection as a separate module, which PEFT's forward never calls."""
    return f"{attention}.{_OUT_PROJ}"


def lookup_name(name: str, attentions: Collection[str]) -> str:
    """The name by which PEFT targets a layer and looks up its rank and alpha."""
    return unwrapped(attention_of(name, attentions) or name)
