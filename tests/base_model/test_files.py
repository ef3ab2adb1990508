"""Files of base models: which of a directory are read, and what is none."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaModel,
)

from devec.base_model.model import base_model
from devec.errors import FormatError
from support.checks.base_weights import (
    _index,
    language_model,
    layers,
    plain,
    read,
    refused,
    single,
    wrong,
)

CPU = torch.device("cpu")


def _pickles(folder):
    torch.save(plain().state_dict(), folder / "pytorch_model.bin")
    return folder


def _a_pickle(folder):
    return _pickles(folder) / "pytorch_model.bin"


def _something_else(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder / "model.gguf"


def _nothing(folder):
    (folder / "README.md").write_text("hello")
    return folder


def _several(folder):
    for name in ("a", "b"):
        single(folder / f"{name}.safetensors", first__weight=torch.ones(4, 6))
    return folder


def _missing_shard(folder):
    path = _index(language_model("llama"), folder)
    min(folder.glob("*.safetensors")).unlink()
    return path


def _paths_in_the_index(folder):
    text = json.dumps({"weight_map": {"first.weight": "../other.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def _no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return folder


def _truncated(folder):
    path = single(folder / "model.safetensors", first__weight=torch.ones(4, 6))
    path.write_bytes(path.read_bytes()[:-8])
    return path


def _missing_folder(folder):
    text = json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]})
    (folder / "model_index.json").write_text(text)
    return folder


def _no_such_path(folder):
    return folder / "missing" / "model.safetensors"


BROKEN = {
    _pickles: ("pytorch_model.bin", "safetensors", "base=model"),
    _a_pickle: ("pytorch_model.bin", "safetensors", "base=model"),
    _something_else: ("model.gguf", ".safetensors"),
    _nothing: ("README.md", ".safetensors"),
    _several: ("a.safetensors", "b.safetensors", "name one"),
    _missing_shard: ("model-00001-of", "downloaded"),
    _paths_in_the_index: ("weight_map",),
    _no_json: ("model.safetensors.index.json", "JSON"),
    _truncated: ("model.safetensors", "truncated"),
    _missing_folder: ("unet", "downloaded"),
    _no_such_path: ("missing", "no such file"),
}


@pytest.mark.parametrize("made", BROKEN)
def test_what_is_no_base_model_is_refused_when_it_is_read(made, tmp_path):
    refused(FormatError, made(tmp_path), *BROKEN[made])


def test_usual_names_come_before_others(tmp_path):
    _several(tmp_path)
    single(tmp_path / "model.safetensors", first__weight=torch.zeros(4, 6))
    assert not read(tmp_path, "first", (4, 6)).any()


def test_nothing_is_opened_before_a_weight_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    handle = base_model(path).weight("first", (4, 6))
    single(path, first__weight=torch.ones(4, 6))
    assert handle.read(torch.float32, CPU).all()


def test_headers_are_read_once(tmp_path, monkeypatch):
    path = _index(language_model("llama"), tmp_path)
    base, weights = base_model(path), layers(language_model("llama"))
    assert wrong(base, ["lm_head"], weights.__getitem__) == []
    # whatever else is needed is in the files of weights
    path.unlink()
    monkeypatch.setattr("devec.base_model.files._header_entries", None)
    assert wrong(base, list(weights), weights.__getitem__) == []


def test_a_checkpoint_without_configuration_is_read_by_shapes(tmp_path):
    model = LlamaModel(language_model("llama").config)
    save_file(model.state_dict(), path := tmp_path / "weights.safetensors")
    expected = layers(model)
    assert wrong(path, list(expected), expected.__getitem__) == []
