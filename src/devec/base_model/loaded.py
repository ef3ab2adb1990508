"""Base models that must be loaded with transformers, since their files cannot be read directly.

The names of layers in the files may differ from those in memory, which adapters use; or the weights
are quantised. Then transformers loads the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.base_model.layers import LOAD_ADVICE, Layer, Model
from devec.base_model.live import live_model
from devec.errors import IncompatibleError, UnsupportedError, warn


def as_loaded(folder: Path, architecture: str, reason: str) -> Model:
    """The model in a directory with its layer names in memory, loaded when a weight is read.

    Args:
        folder: The directory, with a config.json.
        architecture: Name of the model's class in transformers.
        reason: Predicate of a message: what is special about the files.

    Returns:
        The model.

    Raises:
        UnsupportedError: If transformers has no such class, or cannot create the model.
    """
    import transformers

    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise UnsupportedError(f"transformers has no model {architecture!r}; {LOAD_ADVICE}")
    try:
        with _quiet():
            config = kind.config_class.from_pretrained(folder)
        # the names of layers do not depend on how the files are quantised
        config.quantization_config = None
        with torch.device("meta"), _quiet():
            layers = live_model(kind(config)).layers
    except Exception as error:  # of transformers, or of a package for quantisation
        raise UnsupportedError(_cannot_load(folder, error)) from error
    whole = cache(partial(_load_whole, kind, folder, reason))
    return Model(
        str(folder),
        {
            name: dataclasses.replace(layer, load=partial(_weight, whole, name))
            for name, layer in layers.items()
        },
        untied=True,  # in memory, an output layer has its weight even if it is shared
    )


def _weight(whole: Any, name: str) -> Tensor:  # noqa: ANN401
    """The weight of a layer; the first one that is read loads the model."""
    layer: Layer | None = whole().layers.get(name)
    if layer is None:
        raise IncompatibleError(
            f"{whole().where} has no such layer: its files hold no weight for {name!r}"
        )
    return layer.load()


def _load_whole(kind: Any, folder: Path, reason: str) -> Model:  # noqa: ANN401
    """Load the model with transformers."""
    warn(
        f"the files of {str(folder)!r} {reason}; all of it is loaded with transformers, into as "
        "much memory as the model takes"
    )
    try:
        with _quiet():
            model, info = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # of transformers, or of a package for quantisation
        raise UnsupportedError(_cannot_load(folder, error)) from error
    # weights that are missing in the files are random
    random = {key.removesuffix(".weight") for key in info["missing_keys"]}
    layers = {n: layer for n, layer in live_model(model).layers.items() if n not in random}
    return Model(str(folder), layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and messages of transformers."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _cannot_load(folder: Path, error: Exception) -> str:
    """The message for a model that transformers cannot load, with the first line of the reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"transformers cannot load {str(folder)!r} ({reason}); {LOAD_ADVICE}"
