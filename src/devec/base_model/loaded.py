"""Base models whose files are not what the model computes with, as transformers loads them.

A checkpoint may name its layers otherwise than the model that is made of it, and adapters go by the
names in the model; or its weights are quantised. Then transformers loads the whole of it.
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

from devec.base_model.layers import LOAD_IT, Layer, Model
from devec.base_model.live import live_model
from devec.errors import IncompatibleError, UnsupportedError, warn


def as_loaded(folder: Path, architecture: str, reason: str) -> Model:
    """The model in a directory, by the names it has in memory.

    Args:
        folder: The directory, with a config.json.
        architecture: Name of the model's class in transformers, as the configuration has it.
        reason: What the files do, so that they are not read as they are.

    Returns:
        The model. Only its layers are told here; it is loaded when a weight is read.

    Raises:
        UnsupportedError: If transformers knows no such class, or cannot make one.
    """
    import transformers

    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise UnsupportedError(f"transformers has no model {architecture!r}; {LOAD_IT}")
    try:
        with _quiet():
            config = kind.config_class.from_pretrained(folder)
        # what the files are quantised by says nothing of the names
        config.quantization_config = None
        with torch.device("meta"), _quiet():
            layers = live_model(kind(config)).layers
    except Exception as error:  # of transformers, or of what it quantises by
        raise UnsupportedError(_not_loaded(folder, error)) from error
    whole = cache(partial(_load_whole, kind, folder, reason))
    return Model(
        str(folder),
        {
            name: dataclasses.replace(layer, load=partial(_weight, whole, name))
            for name, layer in layers.items()
        },
        untied=True,  # in memory, an output layer that shares its weight has it
    )


def _weight(whole: Any, name: str) -> Tensor:  # noqa: ANN401
    """The weight of a layer of a model that is loaded for the first of them."""
    layer: Layer | None = whole().layers.get(name)
    if layer is None:
        raise IncompatibleError(
            f"{whole().where} has no such layer: its files hold no weight for {name!r}"
        )
    return layer.load()


def _load_whole(kind: Any, folder: Path, reason: str) -> Model:  # noqa: ANN401
    """The model, all of it in memory."""
    warn(
        f"the files of {str(folder)!r} {reason}; all of it is loaded with transformers, into as "
        "much memory as the model takes"
    )
    try:
        with _quiet():
            model, info = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # of transformers, or of what it quantises by
        raise UnsupportedError(_not_loaded(folder, error)) from error
    # what the files lack is drawn at random
    drawn = {key.removesuffix(".weight") for key in info["missing_keys"]}
    layers = {n: layer for n, layer in live_model(model).layers.items() if n not in drawn}
    return Model(str(folder), layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the remarks of transformers."""
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


def _not_loaded(folder: Path, error: Exception) -> str:
    """What to say of a model that transformers cannot load, with the first line of the reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"transformers cannot load {str(folder)!r} ({reason}); {LOAD_IT}"
