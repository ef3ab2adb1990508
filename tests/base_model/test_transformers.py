"""Base weights of models of transformers, from every kind of checkpoint."""

import pytest
import torch

from devec.errors import IncompatibleError
from support.checks.base_weights import (
    LANGUAGE,
    _index,
    _sharded,
    language_model,
    layers,
    read,
    refused,
    wrong,
)

CPU = torch.device("cpu")


def _whole(model, folder):
    model.save_pretrained(folder)
    return folder


def _shards_without_index(model, folder):
    (_index(model, folder)).unlink()
    return folder


def _variant(model, folder):
    model.save_pretrained(folder, variant="fp32")
    return folder


def _sharded_variant(model, folder):
    model.save_pretrained(folder, variant="fp32", max_shard_size="4KB")
    assert (folder / "model.safetensors.index.fp32.json").exists()
    return folder


def _file(model, folder):
    return _whole(model, folder) / "model.safetensors"


def _inner(model, folder):
    model.base_model.save_pretrained(folder)
    return folder


def _live(model, folder):  # noqa: ARG001
    return model


FORMS = [_whole, _sharded, _index, _shards_without_index, _variant, _sharded_variant, _file, _live]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LANGUAGE)
def test_every_layer_of_a_model_of_transformers(kind, form, tmp_path):
    expected = layers(language_model(kind))
    base = form(language_model(kind), tmp_path)
    assert wrong(base, list(expected), expected.__getitem__) == []
    peft = {f"base_model.model.{name}": weight for name, weight in expected.items()}
    assert wrong(base, list(peft), peft.__getitem__) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_checkpoint_of_the_model_without_head_lacks_the_first_name(kind, tmp_path):
    model = language_model(kind)
    prefix = f"{model.base_model_prefix}."
    expected = {n: w for n, w in layers(model).items() if n.startswith(prefix)}
    assert wrong(_inner(model, tmp_path), list(expected), expected.__getitem__) == []


@pytest.mark.parametrize("form", [_whole, _live])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_an_adapter_of_the_model_without_head_lacks_the_first_name(kind, form, tmp_path):
    model = language_model(kind)
    expected = layers(model.base_model)
    assert wrong(form(model, tmp_path), list(expected), expected.__getitem__) == []


@pytest.mark.filterwarnings("ignore:the files of:devec.DevecWarning")
def test_an_output_layer_that_is_not_tied_has_no_weight_in_the_input(tmp_path):
    base = _inner(language_model("llama, not tied"), tmp_path)
    refused(IncompatibleError, base, "no such layer", module="lm_head", shape=(40, 16))


@pytest.mark.parametrize("module", ["lycoris_model_layers_1_mlp_up_proj", "layers.1.mlp.up_proj"])
def test_flat_and_shortened_names_of_language_models(module, tmp_path):
    model = language_model("llama")
    got = read(_whole(model, tmp_path), module, (24, 16))
    assert torch.equal(got, model.model.layers[1].mlp.up_proj.weight)
