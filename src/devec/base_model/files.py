"""Base models in files: safetensors alone, sharded, or in the folders of a pipeline.

Headers are read once, when the first weight is asked for; each weight is then mapped into memory
from its file. No model is ever held as a whole.
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

from devec.base_model.layers import LOAD_IT, Layer, Model, Models, models_of_pipeline
from devec.base_model.loaded import as_loaded
from devec.errors import FormatError, UnsupportedError, listed
from devec.files.json_text import json_object
from devec.naming.module_id import CLIP_G, CLIP_L, DENOISER, T5

# What stands before the names of each model in files that hold several.
_PREFIXES = {
    "model.diffusion_model.": DENOISER,
    "cond_stage_model.transformer.": CLIP_L,
    "conditioner.embedders.0.transformer.": CLIP_L,
    "text_encoders.clip_l.transformer.": CLIP_L,
    "text_encoders.clip_g.transformer.": CLIP_G,
    "text_encoders.t5xxl.transformer.": T5,
}
_OPEN_CLIP = {
    "cond_stage_model.model.": CLIP_L,
    "conditioner.embedders.0.model.": CLIP_G,
    "conditioner.embedders.1.model.": CLIP_G,
}

_ENDINGS = (".safetensors", ".sft")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = re.compile(r".+\.safetensors\.index(?:\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# Of several, what a library opens unless told otherwise.
_USUAL = ("model", "diffusion_pytorch_model")

_PLAIN = ("F64", "F32", "F16", "BF16")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
# Tensors that stand in the place of a weight: GPTQ and AWQ, compressed-tensors.
_PACKED = ("qweight", "weight_packed")

_RENAMED = "name layers otherwise than the model does"

# Models of transformers whose layers of these names are of the class Conv1D.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(?:.+\.)?(?:c_attn|q_attn|c_proj|c_fc)")


def models_in(path: Path) -> Models:
    """The models in a file or directory.

    Args:
        path: A safetensors file, the index of several, a model's directory, or a pipeline's.

    Returns:
        Component → what opens it. The only model of a file or directory is listed as a denoiser,
        whatever it is.

    Raises:
        FormatError: If there are no models, or not in safetensors.
    """
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    files = _files_in(path) if path.is_dir() else _shards(path)
    return _models(path, files)


def model_folder(path: Path) -> Path:
    """The directory of a model for the file or index in it that libraries open; else the path."""
    usual = {f"{stem}.safetensors{end}" for stem in _USUAL for end in ("", ".index.json")}
    return path.parent if path.name in usual else path


def _pipeline(path: Path) -> Models:
    """The models of a directory of diffusers."""
    held = _json(path / "model_index.json")
    classes = {
        slot: entry[1]
        for slot, entry in held.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }

    def opened(slot: str) -> Callable[[], Model]:
        return cache(lambda: _model(path / slot, _stored_in(_files_in(path / slot))))

    return models_of_pipeline(classes, str(path), opened)


def _files_in(folder: Path) -> list[Path]:
    """The files of the model in a directory."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise FormatError(
            f"the folder {str(folder)!r} of the base model is missing; was all of it downloaded?"
        ) from error
    weights = [n for n in names if n.endswith(_ENDINGS) and not n.startswith("adapter_model.")]
    indices = [n for n in names if _INDEX.fullmatch(n)]
    for stem in _USUAL:
        for usual in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if usual in names:
                return _shards(folder / usual)
    if len(indices) == 1:
        return _shards(folder / indices[0])
    stems = {found[1] if (found := _SHARD.fullmatch(n)) else n for n in weights}
    if len(stems) == 1:
        return [folder / name for name in weights]
    if weights:
        raise FormatError(
            f"{str(folder)!r} holds several models, name one of the files: "
            f"{listed(indices or weights)}"
        )
    raise FormatError(_no_weights(folder, names))


def _no_weights(folder: Path, names: Iterable[str]) -> str:
    """What to say of a directory without safetensors."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    return f"{str(folder)!r} holds no .safetensors file of a base model" + (
        f", only {listed(pickles)}: {_PICKLE_ADVICE}"
        if pickles
        else f"; it holds {listed([*names])}"
    )


_PICKLE_ADVICE = (
    "pickles are not read for base models. Save the model with save_pretrained, which writes "
    "safetensors, or load it and give it as it is (base=model)"
)


def _shards(path: Path) -> list[Path]:
    """The files behind the path of one, or of an index."""
    if path.name.endswith(_ENDINGS):
        return [path]
    if not _INDEX.fullmatch(path.name):
        raise FormatError(
            f"{str(path)!r} is no base model: "
            + (
                _PICKLE_ADVICE
                if path.suffix in _PICKLES
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


class _Stored(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    key: str
    shape: tuple[int, ...]
    type: str


def _stored(path: Path) -> dict[str, _Stored]:
    """Key → what the header of a file says."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: _Stored(path, key, tuple(tensor.get_shape()), tensor.get_dtype())
                for key, tensor in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise FormatError(_unreadable(path, error)) from error


def _stored_in(files: Iterable[Path]) -> dict[str, _Stored]:
    """Key → what the headers of files say."""
    return {key: known for path in files for key, known in _stored(path).items()}


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{str(path)!r} is not a readable safetensors file, it may be truncated or corrupt "
        f"({error})"
    )


def _models(path: Path, files: Iterable[Path]) -> Models:
    """The models in files: one, or several told apart by prefixes."""
    stored = _stored_in(files)
    held: dict[str, dict[str, _Stored]] = defaultdict(dict)
    models: Models = {}
    for key in stored:
        for prefix, component in _PREFIXES.items():
            if key.startswith(prefix):
                held[component][key.removeprefix(prefix)] = stored[key]
        for prefix, component in _OPEN_CLIP.items():
            if key.startswith(prefix):
                models[component] = partial(_refuse_open_clip, path)
    if not held:
        return {DENOISER: cache(partial(_model, path, stored))}
    return models | {c: cache(partial(_model, path, own)) for c, own in held.items()}


def _refuse_open_clip(path: Path) -> Model:
    raise UnsupportedError(
        f"{str(path)!r} holds this text encoder under the names of OpenCLIP, which are not those "
        "of adapters; give the model in the form of diffusers (a directory with model_index.json), "
        "or the loaded pipeline (base=pipe)"
    )


def _model(path: Path, stored: Mapping[str, _Stored]) -> Model:
    """A model from what the headers say, and the configuration beside it."""
    config = _config(path)
    architecture = next(iter(config.get("architectures") or []), "") if path.is_dir() else ""
    if config.get("quantization_config"):
        if architecture:
            return as_loaded(path, architecture, "are quantised")
        raise UnsupportedError(f"{str(path)!r} is quantised (quantization_config); {LOAD_IT}")
    ends: dict[str, set[str]] = defaultdict(set)
    for key in stored:
        layer, _, end = key.rpartition(".")
        ends[layer].add(end)
    types = set(_model_types(config))
    conv1d = types & set(_CONV1D_MODELS)
    layers = {}
    for name, known in ends.items():
        weight = next((end for end in ("weight", *_PACKED) if end in known), "")
        if not weight or not name or len(stored[f"{name}.{weight}"].shape) < 2:
            continue
        found = stored[f"{name}.{weight}"]
        load = partial(_load, found, quantised=_is_quantised(found, weight, known))
        shape = (found.shape[0], math.prod(found.shape[1:]))
        # a kernel is never stored transposed, even if its matrix would fit the other way round
        certain = len(found.shape) > 2 or (bool(types) and shape[0] == shape[1])
        turned = bool(conv1d and _CONV1D.fullmatch(name)) or (False if certain else None)
        layers[name] = Layer(shape, load, turned)
    return Model(
        str(path),
        layers,
        untied=config.get("tie_word_embeddings") is False,
        in_memory=cache(partial(as_loaded, path, architecture, _RENAMED)) if architecture else None,
    )


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The types of a model and of those it is made of, as its configuration has them."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)


def _is_quantised(stored: _Stored, end: str, ends: Collection[str]) -> bool:
    """Whether a weight needs more than its own tensor to be known."""
    if stored.type in _EIGHT_BITS:
        return any("scale" in other for other in ends)
    return end in _PACKED or stored.type not in _PLAIN


def _load(stored: _Stored, *, quantised: bool) -> Tensor:
    """A weight, mapped from its file."""
    if quantised:
        raise UnsupportedError(
            f"{stored.key!r} of {str(stored.file)!r} is quantised ({stored.type}); {LOAD_IT}"
        )
    try:
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise FormatError(_unreadable(stored.file, error)) from error


def _config(path: Path) -> dict[str, Any]:
    """The configuration beside a model's weights, empty if there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return _json(config) if config.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error
    return json_object(text, repr(str(path)))
