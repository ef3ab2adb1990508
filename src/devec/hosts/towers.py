"""Finding the layers of a model that an adapter changes, if it was trained in a part of that model.

CLIP and similar models consist of towers (text, vision, audio) whose layers have the same names. An
adapter trained in one tower alone has these names without the prefix of the tower or, in some
versions of transformers, with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from devec.adapters.layout import Layout
from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed
from devec.formats.peft.layout import PeftLayout

Shape = tuple[int, int]

# A prefix that layers of CLIP's text models have in some versions of transformers only.
_TEXT = "text_model."
# Prefixes under which a single match is accepted without further evidence.
_DEFAULT_PREFIXES = (_TEXT, "")
_TOWERS = {
    "text": "text",
    "vision": "vision",
    "visual": "vision",
    "image": "vision",
    "audio": "audio",
    "speech": "audio",
}


class _Match(NamedTuple):
    """A part of a model that has a layer for each module of an adapter.

    Attributes:
        layers: Module → layer.
        prefix: Prefix of the layers' names that the modules' names lack.
        exact: Whether layers and modules have the same names.
        class_name: Class of that part of the model.
        tower: ``"text"``, ``"vision"`` or ``"audio"``; empty if unknown.
    """

    layers: dict[str, str]
    prefix: str
    exact: bool
    class_name: str
    tower: str


def tower_of(name: str) -> str:
    """The tower that a class or module name mentions (``"text"``, ``"vision"``, ``"audio"``)."""
    words = re.findall(r"[A-Z][a-z]+|(?<![a-z])[a-z]+", name)
    towers = {_TOWERS[word.lower()] for word in words if word.lower() in _TOWERS}
    return towers.pop() if len(towers) == 1 else ""


def class_of(model: Any) -> str:  # noqa: ANN401
    """Name of the class of a model without adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__


def declared_class(layout: Layout | None) -> str:
    """Class of the model that an adapter was trained in, by its configuration, or empty."""
    mapping = layout.config.get("auto_mapping") if isinstance(layout, PeftLayout) else None
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) else ""


def fit(shapes: Iterable[tuple[Shape, Shape]]) -> bool:
    """Whether modules have the shapes of their layers, which may store weights transposed."""
    return all(shape in (own, own[::-1]) for shape, own in shapes)


def require_shape(
    module: str, delta: Delta, model: nn.Module, layer: str, shape: tuple[int, int]
) -> None:
    """Refuse a module whose shape is not that of its layer; some hosts would pad it."""
    if not fit([(delta.shape, shape)]):
        raise IncompatibleError(
            f"module {module!r} is {delta.shape} (out, in), and the layer {layer!r} of "
            f"{type(model).__name__} is {shape}; the adapter is of another base model"
        )


def own_slot(slots: Sequence[str], models: Mapping[str, nn.Module], declared: str) -> str | None:
    """The model of a pipeline that an adapter without prefixes of components is for.

    Args:
        slots: Names of the models whose layers have the names and shapes of the modules.
        models: All models.
        declared: Class of the model that the adapter was trained in; empty if unknown.

    Returns:
        The name, or None if no model has such layers.

    Raises:
        IncompatibleError: If several models have such layers, if the only one is of another tower,
            or if the model of the declared class is not among them.
    """
    classes = {slot: class_of(model) for slot, model in models.items()}
    named = [slot for slot in classes if declared and classes[slot] == declared]
    own = [slot for slot in slots if slot in named] or list(slots)
    if not own:
        return None
    proven = own[0] in named or not named
    if len(own) == 1 and proven and not _differ(tower_of(classes[own[0]]), tower_of(declared)):
        return own[0]
    where = listed([f"{slot} {classes[slot]}".strip() for slot in dict.fromkeys([*slots, *named])])
    raise IncompatibleError(
        f"its layers have the names of layers of {where}, and {_trained_in(declared)}; add it to "
        "the model that it is for (e.g. devec.add_adapter(pipe.text_encoder, adapter, name))"
    )


def layers_for(
    shapes: Mapping[str, Shape], known: Mapping[str, Shape], model: nn.Module, declared: str
) -> dict[str, str]:
    """Match the modules of an adapter to layers of a model.

    The layers have the same names, or names that differ by the prefix of a tower. Of several
    towers, the one is chosen that alone has layers of the adapter's shapes, is of the class that
    the adapter was trained in, or is the same tower (text, vision, audio).

    Args:
        shapes: Module → shape (out, in).
        known: Layer of the model → shape of its weight.
        model: The model.
        declared: Class of the model that the adapter was trained in; empty if unknown.

    Returns:
        Module → layer, without modules that match no layer.

    Raises:
        IncompatibleError: If several parts of the model match, or the only one that does is of
            another tower than the adapter.
    """
    modules = list(shapes)
    matches = _matches(modules, known, model) if modules else []
    fitting = [
        match
        for match in matches
        if fit((shapes[module], known[layer]) for module, layer in match.layers.items())
    ]
    matches = fitting or matches
    tower = tower_of(declared) or _common_tower(modules)
    candidates = [m for m in matches if m.class_name == declared or not _differ(m.tower, tower)]
    match = _proven(candidates, declared, tower)
    if match is not None:
        return match.layers
    if any(match.prefix in _DEFAULT_PREFIXES for match in matches):
        layers = listed([match.layers[modules[0]] for match in candidates or matches])
        raise IncompatibleError(
            f"module {modules[0]!r} could be {layers} of {class_of(model)}, and "
            f"{_trained_in(declared)}; add it to the part of the model that it is for (e.g. "
            "devec.add_adapter(model.vision_model, adapter, name))"
        )
    return {module: module for module in modules if module in known}


def _proven(matches: Sequence[_Match], declared: str, tower: str) -> _Match | None:
    """The match that the names or the configuration of an adapter prove, None if none is proven."""
    proofs: tuple[Callable[[_Match], bool], ...] = (
        lambda match: match.class_name == declared,
        lambda match: match.exact,
        lambda match: bool(tower) and match.tower == tower,
    )
    for proof in proofs:
        proven = [match for match in matches if proof(match)]
        if len(proven) == 1:
            return proven[0]
    return matches[0] if len(matches) == 1 and matches[0].prefix in _DEFAULT_PREFIXES else None


def _matches(modules: Sequence[str], known: Mapping[str, Shape], model: nn.Module) -> list[_Match]:
    """All parts of a model that have a layer for each module of an adapter."""
    first = modules[0]
    bare = first.removeprefix(_TEXT)
    names = [(module, module.removeprefix(_TEXT)) for module in modules]
    prefixes = {layer.removesuffix(bare) for layer in known if f".{layer}".endswith(f".{bare}")}
    exact, matches = {module: module for module in modules}, []
    for prefix in sorted(prefixes):
        layers = {module: f"{prefix}{name}" for module, name in names}
        if all(layer in known for layer in layers.values()):
            matches.append(_match(layers, prefix, model, exact=exact == layers))
    if not any(match.exact for match in matches) and all(module in known for module in modules):
        matches.append(_match(exact, "", model, exact=True))
    return matches


def _match(layers: dict[str, str], prefix: str, model: Any, *, exact: bool) -> _Match:  # noqa: ANN401
    """A match, with the class and the tower of the part of the model under a prefix."""
    part: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    towers = [tower_of(type(part).__name__)]
    for name in prefix.split(".")[:-1]:
        part = getattr(part, name)
        towers += [tower_of(name), tower_of(type(part).__name__)]
    innermost = next((tower for tower in reversed(towers) if tower), "")
    return _Match(layers, prefix, exact, type(part).__name__, innermost)


def _common_tower(modules: Sequence[str]) -> str:
    """The tower that the names of all modules of an adapter begin with, or empty."""
    prefixes = {module.partition(".")[0] for module in modules}
    return tower_of(prefixes.pop()) if len(prefixes) == 1 else ""


def _differ(tower: str, other: str) -> bool:
    """Whether two towers are both known and differ."""
    return bool(tower) and bool(other) and tower != other


def _trained_in(declared: str) -> str:
    """The clause of a message on the model that an adapter was trained in."""
    return f"it was trained in {declared}" if declared else "it does not say what it was trained in"
