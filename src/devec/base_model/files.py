"""Base models in safetensors files: single, sharded, or in the folders of a pipeline.

Headers are read once, on the first access to a weight. Each weight is then mapped into memory from
its file; a model is never loaded whole.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from devec.base_model.layers import LOAD_ADVICE, Layer, Model, ModelOpeners, models_of_pipeline
from devec.base_model.loaded import as_loaded
from devec.errors import FormatError, UnsupportedError, listed
from devec.files.json_text import json_object
from devec.files.safetensors_reader import PICKLE_ENDINGS
from devec.naming.module_id import CLIP_G, CLIP_L, DENOISER, T5

# Prefixes of the layer names of each model, in files of several models.
_PREFIXES = {
    "model.diffusion_model.": DENOISER,
    "cond_stage_model.transformer.": CLIP_L,
    "conditioner.embedders.0.transformer.": CLIP_L,
    "text_encoders.clip_l.transformer.": CLIP_L,
    "text_encoders.clip_g.transformer.": CLIP_G,
    "text_encoders.t5xxl.transformer.": T5,
}
_OPEN_CLIP_PREFIXES = {
    "cond_stage_model.model.": CLIP_L,
    "conditioner.embedders.0.model.": CLIP_G,
    "conditioner.embedders.1.model.": CLIP_G,
}

_ENDINGS = (".safetensors", ".sft")
_INDEX = re.compile(r".+\.safetensors\.index(?:\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# The stems that libraries open by default if a directory contains several files.
_STANDARD_STEMS = ("model", "diffusion_pytorch_model")

_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
_FLOAT8_TYPES = ("F8_E4M3", "F8_E5M2")
# Names of packed tensors that replace a weight: GPTQ and AWQ, compressed-tensors.
_PACKED_WEIGHTS = ("qweight", "weight_packed")

_RENAMES_LAYERS = "name layers otherwise than the model does"

# Models of transformers in which layers of these names are of class Conv1D.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(?:.+\.)?(?:c_attn|q_attn|c_proj|c_fc)")


def models_in(path: Path) -> ModelOpeners:
    """The models in a safetensors file, a sharded index, or the directory of a model or pipeline.

    A single model is listed as a denoiser, whatever it is.

    Args:
        path: The file or directory.

    Returns:
        Component → function that opens its model.

    Raises:
        FormatError: If there is no model in safetensors.
    """
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    files = _model_files(path) if path.is_dir() else _shards(path)
    return _models(path, files)


def model_folder(path: Path) -> Path:
    """The directory of the file or index that libraries open by default; else the path itself."""
    standard = {
        f"{stem}.safetensors{end}" for stem in _STANDARD_STEMS for end in ("", ".index.json")
    }
    return path.parent if path.name in standard else path


def _pipeline(path: Path) -> ModelOpeners:
    """The models in the directory of a pipeline of diffusers."""
    entries = _json(path / "model_index.json")
    classes = {
        slot: entry[1]
        for slot, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }

    def opener(slot: str) -> Callable[[], Model]:
        return cache(lambda: _model(path / slot, _all_entries(_model_files(path / slot))))

    return models_of_pipeline(classes, str(path), opener)


def _model_files(folder: Path) -> list[Path]:
    """The files of the model in a directory."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise FormatError(
            f"the folder {str(folder)!r} of the base model is missing; was all of it downloaded?"
        ) from error
    weights = [n for n in names if n.endswith(_ENDINGS) and not n.startswith("adapter_model.")]
    indices = [n for n in names if _INDEX.fullmatch(n)]
    for stem in _STANDARD_STEMS:
        for standard in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if standard in names:
                return _shards(folder / standard)
    if len(indices) == 1:
        return _shards(folder / indices[0])
    stems = {match[1] if (match := _SHARD.fullmatch(n)) else n for n in weights}
    if len(stems) == 1:
        return [folder / name for name in weights]
    if weights:
        raise FormatError(
            f"{str(folder)!r} holds several models, name one of the files: "
            f"{listed(indices or weights)}"
        )
    raise FormatError(_no_weights(folder, names))


def _no_weights(folder: Path, names: Iterable[str]) -> str:
    """The message for a directory without safetensors files."""
    pickles = [name for name in names if name.endswith(PICKLE_ENDINGS)]
    return f"{str(folder)!r} holds no .safetensors file of a base model" + (
        f", only {listed(pickles)}: {_PICKLE_ADVICE}"
        if pickles
        else f"; it holds {listed([*names])}"
    )


_PICKLE_ADVICE = (
    "pickles are not read for base models. Save the model with save_pretrained, which writes "
    "safetensors, or load it and give the loaded model (base=model)"
)


def _shards(path: Path) -> list[Path]:
    """The files of a model, from the path of its file or index."""
    if path.name.endswith(_ENDINGS):
        return [path]
    if not _INDEX.fullmatch(path.name):
        raise FormatError(
            f"{str(path)!r} is no base model: "
            + (
                _PICKLE_ADVICE
                if path.suffix in PICKLE_ENDINGS
                else "expected a .safetensors file, the "
                "index of several (.safetensors.index.json), or a directory"
            )
        )
    weights = _json(path).get("weight_map")
    files = list(weights.values()) if isinstance(weights, dict) else []
    if not files or any(str(f) != PurePosixPath(str(f)).name for f in files):
        raise FormatError(f"{str(path)!r} has no weight_map with names of files beside it")
    shards = [path.parent / name for name in sorted(set(files))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FormatError(
            f"{listed(missing)} of {str(path)!r} is missing; was all of the model downloaded?"
        )
    return shards


class _HeaderEntry(NamedTuple):
    """The entry of a tensor in the header of a file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    type: str


def _header_entries(path: Path) -> dict[str, _HeaderEntry]:
    """Key → entry in the header of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: _HeaderEntry(path, key, tuple(tensor.get_shape()), tensor.get_dtype())
                for key, tensor in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise FormatError(_unreadable(path, error)) from error


def _all_entries(files: Iterable[Path]) -> dict[str, _HeaderEntry]:
    """Key → entry in the headers of files."""
    return {key: entry for path in files for key, entry in _header_entries(path).items()}


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{str(path)!r} is not a readable safetensors file, it may be truncated or corrupt "
        f"({error})"
    )


def _models(path: Path, files: Iterable[Path]) -> ModelOpeners:
    """The models in files: one, or several distinguished by prefixes."""
    entries = _all_entries(files)
    by_component: dict[str, dict[str, _HeaderEntry]] = defaultdict(dict)
    openers: ModelOpeners = {}
    for key in entries:
        for prefix, component in _PREFIXES.items():
            if key.startswith(prefix):
                by_component[component][key.removeprefix(prefix)] = entries[key]
        for prefix, component in _OPEN_CLIP_PREFIXES.items():
            if key.startswith(prefix):
                openers[component] = partial(_refuse_open_clip, path)
    if not by_component:
        return {DENOISER: cache(partial(_model, path, entries))}
    return openers | {c: cache(partial(_model, path, own)) for c, own in by_component.items()}


def _refuse_open_clip(path: Path) -> Model:
    raise UnsupportedError(
        f"{str(path)!r} holds this text encoder under the names of OpenCLIP, which are not those "
        "of adapters; give the model in the format of diffusers (a directory with "
        "model_index.json), or the loaded pipeline (base=pipe)"
    )


def _model(path: Path, entries: Mapping[str, _HeaderEntry]) -> Model:
    """A model from the entries of headers and the configuration beside the files."""
    config = _config(path)
    architecture = next(iter(config.get("architectures") or []), "") if path.is_dir() else ""
    if config.get("quantization_config"):
        if architecture:
            return as_loaded(path, architecture, "are quantised")
        raise UnsupportedError(f"{str(path)!r} is quantised (quantization_config); {LOAD_ADVICE}")
    return Model(
        str(path),
        _layers(entries, set(_model_types(config))),
        untied=config.get("tie_word_embeddings") is False,
        in_memory=(
            cache(partial(as_loaded, path, architecture, _RENAMES_LAYERS)) if architecture else None
        ),
    )


def _layers(entries: Mapping[str, _HeaderEntry], types: Collection[str]) -> dict[str, Layer]:
    """Name → layer with a weight, in a model of given types (empty if unknown)."""
    ends: dict[str, set[str]] = defaultdict(set)
    for key in entries:
        layer, _, end = key.rpartition(".")
        ends[layer].add(end)
    has_conv1d = not set(_CONV1D_MODELS).isdisjoint(types)
    layers = {}
    for name, own in ends.items():
        weight = next((end for end in ("weight", *_PACKED_WEIGHTS) if end in own), "")
        if not weight or not name or len(entries[f"{name}.{weight}"].shape) < 2:
            continue
        entry = entries[f"{name}.{weight}"]
        load = partial(_load, entry, quantised=_is_quantised_entry(entry, weight, own))
        shape = (entry.shape[0], math.prod(entry.shape[1:]))
        # a kernel is never stored transposed, even if its matrix would fit the other way round
        is_plain = len(entry.shape) > 2 or (bool(types) and shape[0] == shape[1])
        transposed = (has_conv1d and bool(_CONV1D.fullmatch(name))) or (False if is_plain else None)
        layers[name] = Layer(shape, load, transposed)
    return layers


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The types of a model and of its submodels in its configuration."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)


def _is_quantised_entry(entry: _HeaderEntry, end: str, ends: Collection[str]) -> bool:
    """Whether the values of a weight depend on more than its own tensor."""
    if entry.type in _FLOAT8_TYPES:
        return any("scale" in other for other in ends)
    return end in _PACKED_WEIGHTS or entry.type not in _PLAIN_TYPES


def _load(entry: _HeaderEntry, *, quantised: bool) -> Tensor:
    """Load a weight, mapped from its file."""
    if quantised:
        raise UnsupportedError(
            f"{entry.key!r} of {str(entry.file)!r} is quantised ({entry.type}); {LOAD_ADVICE}"
        )
    try:
        with safe_open(entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(entry.key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise FormatError(_unreadable(entry.file, error)) from error


def _config(path: Path) -> dict[str, Any]:
    """The configuration beside the weights of a model, empty if there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return _json(config) if config.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error
    return json_object(text, repr(str(path)))
