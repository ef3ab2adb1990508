"""Embeddings of the base model that PEFT saves beside an adapter.

PEFT saves the input and output embeddings of a model whose vocabulary was resized, since no file of
the base model contains the added rows, and embeddings that an adapter changes.
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
from devec.hosts.layers import NamedModules, is_wrapper, walk, wrapped

# The names by which PEFT recognises that an adapter changes an embedding.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def base_copies(
    model: Any,  # noqa: ANN401
    modules: NamedModules,
    name: str,
    config: Config,
) -> dict[str, Tensor]:
    """PEFT's key without wrappers → copy of each embedding that it would save with an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    resized = _is_resized(inner, config)
    layers = {path: _unwrapped(layer) for path, layer in _embeddings(inner, modules).items()}
    changed = [
        path
        for path, (wrappers, _) in layers.items()
        if any(_has_factors(wrapper, name) for wrapper in wrappers)
    ]
    if config.get("trainable_token_indices") is not None:
        changed = []
    recognised = any(path.rpartition(".")[2] in _EMBEDDING_NAMES for path in changed)
    saved = changed if recognised else []
    return {
        f"{PREFIX}{path}.{key}": tensor.clone()
        for path in (layers if resized else saved)
        for key, tensor in _layer_tensors(layers[path][1]).items()
    }


def _embeddings(inner: Any, modules: NamedModules) -> dict[str, Any]:  # noqa: ANN401
    """Name → input or output embedding, as the outermost wrapper of the layer."""
    layers = [_embedding(inner, call) for call in ("get_input_embeddings", "get_output_embeddings")]
    names = {id(module): path.removeprefix(PREFIX) for path, module in modules}
    return {names[id(layer)]: layer for layer in layers if id(layer) in names}


def _embedding(inner: Any, call: str) -> Any:  # noqa: ANN401
    """The embedding that a getter of a model returns, None if it has none."""
    try:
        return getattr(inner, call, lambda: None)()
    except NotImplementedError:
        return None


def _unwrapped(layer: Any) -> tuple[list[Any], Any]:  # noqa: ANN401
    """PEFT's wrappers around a layer, outermost first, and the layer itself."""
    wrappers = []
    while is_wrapper(layer):
        wrappers.append(layer)
        layer = wrapped(layer)[1]
    return wrappers, layer


def _has_factors(wrapper: Any, name: str) -> bool:  # noqa: ANN401
    """Whether a wrapper holds factors of an adapter."""
    kinds = ("lora_A", "lora_embedding_A")
    return any(name in getattr(wrapper, kind, ()) for kind in kinds)


def _is_resized(inner: Any, config: Config) -> bool:  # noqa: ANN401
    """Whether the vocabulary of a model differs from that of its base model in local files."""
    # PEFT queries the Hub for it; here only local files are read
    own = _vocabulary_size(getattr(inner, "config", None))
    base = config.get("base_model_name_or_path") or getattr(inner, "name_or_path", "")
    if own is None or not isinstance(base, str) or not base:
        return False
    path = Path(base) / "config.json"
    if not path.is_file():
        path = _cached_config(base, config.get("revision"))
    try:
        stored = _vocabulary_size(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        warn(
            f"{type(inner).__name__} has no configuration on the disk under {base!r}, so it is "
            "assumed to have the vocabulary of its base model; if it was resized, save the model "
            "and set base_model_name_or_path of the adapter to that directory"
        )
        return False
    return stored is not None and stored != own


def _cached_config(base: str, revision: Any) -> Path:  # noqa: ANN401
    """The path of a model's configuration in the local cache of the Hub; it need not exist."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:  # the path of a directory that no longer exists
        cached = None
    return Path(cached) if isinstance(cached, str) else Path(base) / "config.json"


def _vocabulary_size(config: Any) -> int | None:  # noqa: ANN401
    """The vocabulary size in a configuration, given as an object or as the JSON of its file."""
    fields = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    text = fields.get("text_config")
    size = fields.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def require_same_embeddings(copies: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse an adapter that was saved with base weights other than those of the model."""
    modules = list(walk(model)) if copies else []
    for key, copy in copies.items():
        own = _base_tensor(modules, key)
        if own is None or own.shape != copy.shape or not torch.equal(own.to(copy), copy):
            raise UnsupportedError(
                f"it was saved with a base weight ({key!r}) that is not the one of "
                f"{type(model).__name__}; load it with the host's own load_adapter"
            )


def _base_tensor(modules: NamedModules, key: str) -> Tensor | None:
    """The tensor of a model that corresponds to a key of PEFT's, None if there is none."""
    path, _, last = key.removeprefix(PREFIX).rpartition(".")
    path = path.replace(".token_adapter", "").replace(".base_layer", "")
    layer = next((module for name, module in modules if name.removeprefix(PREFIX) == path), None)
    return None if layer is None else _layer_tensors(_unwrapped(layer)[1]).get(last)


def _layer_tensors(layer: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Name → floating-point tensor of a layer, loaded if accelerate has offloaded it."""
    from accelerate.utils import align_module_device

    if not any(tensor.is_meta for tensor in layer.parameters()):
        tensors = dict(layer.state_dict())
    else:
        with align_module_device(layer):
            tensors = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
