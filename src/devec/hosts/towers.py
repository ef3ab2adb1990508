"""Which layers of a model an adapter changes, where it was made for a part of that model.

CLIP and its like are made of towers, of text, images or sound, whose layers have the same names;
an adapter of one tower alone has them without the tower's name, or, in some versions of
transformers, with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from devec.deltas.delta import Delta
from devec.errors import IncompatibleError, listed

Shape = tuple[int, int]

# The part that CLIP's text models have in some versions of transformers and not in others.
_TEXT = "text_model."
_GUESSED = (_TEXT, "")
_KINDS = {
    "text": "text",
    "vision": "vision",
    "visual": "vision",
    "image": "vision",
    "audio": "audio",
    "speech": "audio",
}


class _Site(NamedTuple):
    """A place in a model for all modules of an adapter.

    Attributes:
        layers: Module → layer.
        prefix: What the layers' names begin with and the modules' do not.
        exact: Whether both have the same names.
        known_as: Class of the part of the model that the layers are in.
        kind: Of what it is a tower; empty if that is not known.
    """

    layers: dict[str, str]
    prefix: str
    exact: bool
    known_as: str
    kind: str


def kind_of(name: str) -> str:
    """What a class or a part of a model is for, by the words of its name.

    Args:
        name: Name of a class, or of a module.

    Returns:
        ``"text"``, ``"vision"`` or ``"audio"``; empty if the name says none of them, or several.
    """
    words = re.findall(r"[A-Z][a-z]+|(?<![a-z])[a-z]+", name)
    kinds = {_KINDS[word.lower()] for word in words if word.lower() in _KINDS}
    return kinds.pop() if len(kinds) == 1 else ""


def class_of(model: Any) -> str:  # noqa: ANN401
    """Name of the class of a model without adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__


def declared_class(layout: Any) -> str:  # noqa: ANN401
    """Class of the model that an adapter was trained in, by its own record, or empty."""
    config = getattr(layout, "config", None)
    mapping = config.get("auto_mapping") if isinstance(config, dict) else None
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) else ""


def fit(shapes: Iterable[tuple[Shape, Shape]]) -> bool:
    """Whether modules have the shapes of their layers, some of which store weights transposed."""
    return all(shape in (own, own[::-1]) for shape, own in shapes)


def require_shape(
    module: str, delta: Delta, model: nn.Module, layer: str, shape: tuple[int, int]
) -> None:
    """Refuse a module that is of another shape than the layer; some hosts would fill it up.

    Args:
        module: Name of the module.
        delta: Its change.
        model: The model.
        layer: Name of the layer that the module is.
        shape: Shape of the layer's weight.

    Raises:
        IncompatibleError: If the shapes differ.
    """
    if not fit([(delta.shape, shape)]):
        raise IncompatibleError(
            f"module {module!r} is {delta.shape} (out, in), and the layer {layer!r} of "
            f"{type(model).__name__} is {shape}; the adapter is of another base model"
        )


def own_slot(slots: Sequence[str], models: Mapping[str, nn.Module], declared: str) -> str | None:
    """The model of a pipeline that an adapter is for, which does not name it.

    Args:
        slots: Names of the models whose layers have the names and shapes of its modules.
        models: All models.
        declared: Class of the model that it was trained in; empty if it does not say.

    Returns:
        The name, or None if no model has such layers.

    Raises:
        IncompatibleError: If several have, or only one of another kind than it was trained in, or
            one whose layers have other names is of the very class that it was trained in.
    """
    classes = {slot: class_of(model) for slot, model in models.items()}
    named = [slot for slot in classes if declared and classes[slot] == declared]
    own = [slot for slot in slots if slot in named] or list(slots)
    if not own:
        return None
    proven = own[0] in named or not named
    if len(own) == 1 and proven and not _differ(kind_of(classes[own[0]]), kind_of(declared)):
        return own[0]
    where = listed([f"{slot} {classes[slot]}".strip() for slot in dict.fromkeys([*slots, *named])])
    raise IncompatibleError(
        f"its layers have the names of layers of {where}, and {_made(declared)}; add it to the "
        "model that it is for (e.g. devec.add_adapter(pipe.text_encoder, adapter, name))"
    )


def layers_for(
    shapes: Mapping[str, Shape], known: Mapping[str, Shape], model: nn.Module, declared: str
) -> dict[str, str]:
    """The layers of a model that the modules of an adapter are.

    The layers of the same names, or else of names with a tower's name before them or without it.
    Of several towers, the only one whose layers have the adapter's shapes, or whose class is the
    one that the adapter was trained in, or which is of the same kind (text, vision, audio).

    Args:
        shapes: Module → shape (out, in).
        known: Layer of the model → shape of its weight.
        model: The model.
        declared: Class of the model that the adapter was trained in; empty if it does not say.

    Returns:
        Module → layer; modules that are nowhere are left out.

    Raises:
        IncompatibleError: If there are several places, or the only one is of another kind than the
            adapter.
    """
    modules = list(shapes)
    found = _sites(modules, known, model) if modules else []
    pairs = [[(shapes[m], known[layer]) for m, layer in site.layers.items()] for site in found]
    found = [site for site, own in zip(found, pairs, strict=True) if fit(own)] or found
    said = kind_of(declared) or _common_kind(modules)
    left = [site for site in found if site.known_as == declared or not _differ(site.kind, said)]
    site = _only(left, declared, said)
    if site is not None:
        return site.layers
    if any(site.prefix in _GUESSED for site in found):
        places = listed([site.layers[modules[0]] for site in left or found])
        raise IncompatibleError(
            f"module {modules[0]!r} could be {places} of {class_of(model)}, and "
            f"{_made(declared)}; add it to the part of the model that it is for (e.g. "
            "devec.add_adapter(model.vision_model, adapter, name))"
        )
    return {module: module for module in modules if module in known}


def _only(sites: Sequence[_Site], declared: str, said: str) -> _Site | None:
    """The site that the names or the record of an adapter prove to be its own."""
    proofs: tuple[Callable[[_Site], bool], ...] = (
        lambda site: site.known_as == declared,
        lambda site: site.exact,
        lambda site: bool(said) and site.kind == said,
    )
    for proof in proofs:
        proven = [site for site in sites if proof(site)]
        if len(proven) == 1:
            return proven[0]
    return sites[0] if len(sites) == 1 and sites[0].prefix in _GUESSED else None


def _sites(modules: Sequence[str], known: Mapping[str, Shape], model: nn.Module) -> list[_Site]:
    """All places for all modules of an adapter."""
    first = modules[0]
    bare = first.removeprefix(_TEXT)
    spelled = [(module, module.removeprefix(_TEXT)) for module in modules]
    prefixes = {layer.removesuffix(bare) for layer in known if f".{layer}".endswith(f".{bare}")}
    exact, found = {module: module for module in modules}, []
    for prefix in sorted(prefixes):
        layers = {module: f"{prefix}{name}" for module, name in spelled}
        if all(layer in known for layer in layers.values()):
            found.append(_site(layers, prefix, model, exact=exact == layers))
    if not any(site.exact for site in found) and all(module in known for module in modules):
        found.append(_site(exact, "", model, exact=True))
    return found


def _site(layers: dict[str, str], prefix: str, model: Any, *, exact: bool) -> _Site:  # noqa: ANN401
    """A site, with what there is to say of the part of the model that it is in."""
    part: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [kind_of(type(part).__name__)]
    for name in prefix.split(".")[:-1]:
        part = getattr(part, name)
        kinds += [kind_of(name), kind_of(type(part).__name__)]
    kind = next((kind for kind in reversed(kinds) if kind), "")
    return _Site(layers, prefix, exact, type(part).__name__, kind)


def _common_kind(modules: Sequence[str]) -> str:
    """What tower all modules of an adapter are in, by their own names."""
    parts = {module.partition(".")[0] for module in modules}
    return kind_of(parts.pop()) if len(parts) == 1 else ""


def _differ(kind: str, said: str) -> bool:
    """Whether two kinds are known and not the same."""
    return bool(kind) and bool(said) and kind != said


def _made(declared: str) -> str:
    """What an adapter says of the model that it was trained in."""
    return f"it was trained in {declared}" if declared else "it does not say what it was trained in"
