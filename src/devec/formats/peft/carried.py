"""The keys of carried tensors and base weights beside the factors of a PEFT adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from devec.formats.peft.names import unwrapped
from devec.formats.rank_patterns import Config


def replaced(config: Config, keys: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The modules that PEFT cannot adapt, because whole tensors replace them or an outer module.

    As in PEFT, ``modules_to_save`` and the keys of ``trainable_token_indices`` are endings of
    names, and no module inside a saved one is adapted. Trained biases replace nothing: PEFT loads
    them beside factors.

    Args:
        config: The configuration of the adapter that the tensors belong to.
        keys: Keys of its whole tensors, without PEFT's prefix.
        modules: Names of modules that another adapter changes.

    Returns:
        The names.
    """
    biases = config.get("bias", "none") != "none"
    above: set[str] = set()
    for key in keys:
        if not (biases and _is_bias(key)):
            parts = unwrapped(key).split(".")
            above.update(".".join(parts[:end]) for end in range(1, len(parts)))
    saved = tuple(config.get("modules_to_save") or ())
    tokens = config.get("trainable_token_indices")
    ends = (*saved, *(tokens if isinstance(tokens, dict) else ()))
    return [
        module
        for module in modules
        if (name := unwrapped(module.partition("[")[0])) in above
        or name.endswith(ends)
        or any(f".{whole}." in f".{name}." for whole in saved)
    ]


def of_base(config: Config, keys: Iterable[str]) -> list[str]:
    """The keys of whole tensors that are base weights: no field of the configuration names them."""
    # PEFT saves embeddings like this if the vocabulary was resized, and loads them into the model
    biases = config.get("bias", "none") != "none"
    saved = tuple(config.get("modules_to_save") or ())
    return [
        key
        for key in keys
        if not (biases and _is_bias(key))
        and ".trainable_tokens" not in key
        and not (path := key.rpartition(".")[0]).endswith(saved)
        and not any(f".{whole}." in f".{path}." for whole in saved)
    ]


def keys_beside(config: Config, keys: Iterable[str], adapted: Collection[str]) -> dict[str, str]:
    """Key of a carried tensor → the key under which PEFT loads it beside factors.

    PEFT loads the bias of a layer under another key if the layer is adapted, and silently ignores
    keys that its model does not have.

    Args:
        config: The configuration to write.
        keys: The keys.
        adapted: Paths of the layers with factors.

    Returns:
        Key → key to write.
    """
    trained = config.get("bias", "none") != "none"
    return {key: _beside(key, adapted) if trained and _is_bias(key) else key for key in keys}


def bias_field(config: Config, keys: Iterable[str]) -> str:
    """The value of ``bias`` in a configuration for these keys."""
    # with "lora_only" PEFT would load the bias of a layer without factors and not save it again
    field: str = config.get("bias", "none")
    alone = any(_is_bias(key) and ".base_layer." not in key for key in keys)
    return "all" if field == "lora_only" and alone else field


def copies_beside(
    keys: Iterable[str],
    carried: Collection[str],
    adapted: Collection[str],
    missing: Collection[str],
) -> dict[str, str]:
    """Key of a base weight → the key under which PEFT loads it beside factors.

    Args:
        keys: The keys, with or without ``base_layer``.
        carried: Keys of the carried tensors to write.
        adapted: Paths of the layers with factors.
        missing: Paths of the layers that had factors and have none in the result.

    Returns:
        Key → key to write; without weights that a carried tensor replaces, and without those of
        missing layers.
    """
    result: dict[str, str] = {}
    for key in keys:
        path, _, last = key.rpartition(".")
        path = path.removesuffix(".base_layer")
        if path in adapted:
            result[key] = f"{path}.base_layer.{last}"
        elif any(other.startswith(f"{path}.token_adapter.") for other in carried):
            result[key] = f"{path}.token_adapter.base_layer.{last}"
        elif path not in missing and f"{path}.{last}" not in carried:
            result[key] = f"{path}.{last}"
    return result


def _is_bias(key: str) -> bool:
    """Whether a key stores a bias; nn.MultiheadAttention has an ``in_proj_bias``."""
    return key.endswith("bias")


def _beside(key: str, adapted: Collection[str]) -> str:
    """A key with ``base_layer`` after exactly the wrapped layers."""
    path, *rest = unwrapped(key).split(".")
    for part in rest:
        while path in adapted:
            path += ".base_layer"
        path += f".{part}"
    return path
