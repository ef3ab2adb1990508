"""Weights of the base model that PEFT saves beside an adapter: embeddings that may be its own.

PEFT saves the input and output embeddings of a model whose vocabulary was resized, since the rows
that were added are in no file of the base model, and those that an adapter is on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from devec.errors import UnsupportedError, warn
from devec.formats.peft.names import PREFIX
from devec.formats.rank_patterns import Config
from devec.hosts.layers import Parts, inside, is_wrapper, walk

# The layers by whose names PEFT tells that an adapter is on an embedding.
_NAMES = ("embed_tokens", "lm_head")


def base_copies(model: Any, parts: Parts, name: str, config: Config) -> dict[str, Tensor]:  # noqa: ANN401
    """The weights of embeddings that PEFT would save beside an adapter, and all that were resized.

    Args:
        model: The model.
        parts: Its modules.
        name: Name of an adapter that it holds.
        config: The configuration of the adapter.

    Returns:
        Key that PEFT would give the tensor if nothing were on the layer → a copy of the tensor.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    resized = _is_resized(inner, config)
    layers = {at: _unwrapped(layer) for at, layer in _embeddings(inner, parts).items()}
    on = [at for at, (wrappers, _) in layers.items() if any(_is_on(w, name) for w in wrappers)]
    if config.get("trainable_token_indices") is not None:
        on = []
    saved = on if any(at.rpartition(".")[2] in _NAMES for at in on) else []
    return {
        f"{PREFIX}{at}.{key}": tensor.clone()
        for at in (layers if resized else saved)
        for key, tensor in _state(layers[at][1]).items()
    }


def _embeddings(inner: Any, parts: Parts) -> dict[str, Any]:  # noqa: ANN401
    """Name → layer of the input and output embeddings, the outermost wrapper of each."""
    layers = [_given(inner, call) for call in ("get_input_embeddings", "get_output_embeddings")]
    names = {id(module): at.removeprefix(PREFIX) for at, module in parts}
    return {names[id(layer)]: layer for layer in layers if id(layer) in names}


def _given(inner: Any, call: str) -> Any:  # noqa: ANN401
    """What a model gives as its embeddings, None if it has none."""
    try:
        return getattr(inner, call, lambda: None)()
    except NotImplementedError:
        return None


def _unwrapped(layer: Any) -> tuple[list[Any], Any]:  # noqa: ANN401
    """What PEFT has put around a layer, and the layer."""
    wrappers = []
    while is_wrapper(layer):
        wrappers.append(layer)
        layer = inside(layer)[1]
    return wrappers, layer


def _is_on(wrapper: Any, name: str) -> bool:  # noqa: ANN401
    """Whether an adapter has factors in a wrapper."""
    kinds = ("lora_A", "lora_embedding_A")
    return any(name in getattr(wrapper, kind, ()) for kind in kinds)


def _is_resized(inner: Any, config: Config) -> bool:  # noqa: ANN401
    """Whether a model has another vocabulary than the base model in its files, on the disk."""
    # PEFT asks the Hub
    own = _vocabulary(getattr(inner, "config", None))
    base = config.get("base_model_name_or_path") or getattr(inner, "name_or_path", "")
    if own is None or not isinstance(base, str) or not base:
        return False
    path = Path(base) / "config.json"
    if not path.is_file():
        path = _cached(base, config.get("revision"))
    try:
        stored = _vocabulary(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        warn(
            f"{type(inner).__name__} has no configuration on the disk under {base!r}, so that it "
            "is taken to have the vocabulary of its base model; if it was resized, save the model "
            "and set base_model_name_or_path of the adapter to that directory"
        )
        return False
    return stored is not None and stored != own


def _cached(base: str, revision: Any) -> Path:  # noqa: ANN401
    """Where the configuration of a model of the Hub is, if it was downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:  # a directory that is there no more
        found = None
    return Path(found) if isinstance(found, str) else Path(base) / "config.json"


def _vocabulary(config: Any) -> int | None:  # noqa: ANN401
    """The size of the vocabulary by a configuration, an object or as in its file."""
    held = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    inner = held.get("text_config")
    size = held.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None


def require_same(copies: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse base weights beside an adapter that are not those of a model.

    Args:
        copies: Key → weight of the base model that an adapter was saved with.
        model: The model that it is to be added to.

    Raises:
        UnsupportedError: If the model has another weight there, or none.
    """
    parts = list(walk(model)) if copies else []
    for key, copy in copies.items():
        own = _own(parts, key)
        if own is None or own.shape != copy.shape or not torch.equal(own.to(copy), copy):
            raise UnsupportedError(
                f"it was saved with a base weight ({key!r}) that is not the one of "
                f"{type(model).__name__}; load it with the host's own load_adapter"
            )


def _own(parts: Parts, key: str) -> Tensor | None:
    """The tensor of a model that a copy of a base weight is of, None if there is none."""
    path, _, last = key.removeprefix(PREFIX).rpartition(".")
    path = path.replace(".token_adapter", "").replace(".base_layer", "")
    layer = next((module for at, module in parts if at.removeprefix(PREFIX) == path), None)
    return None if layer is None else _state(_unwrapped(layer)[1]).get(last)


def _state(base: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Name → tensor of a layer, from where it is if it was offloaded."""
    from accelerate.utils import align_module_device

    if not any(tensor.is_meta for tensor in base.parameters()):
        held = dict(base.state_dict())
    else:
        with align_module_device(base):
            held = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    return {key: tensor for key, tensor in held.items() if tensor.is_floating_point()}
