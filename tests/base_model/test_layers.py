"""Base weights the right way round, and in the precision asked for."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from devec.base_model.model import base_model
from devec.errors import IncompatibleError
from support.checks.base_weights import (
    plain,
    read,
    refused,
    single,
)

CPU = torch.device("cpu")

SQUARE = torch.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize(
    ("model_type", "name", "turned"),
    [("gpt2", "c_proj", True), ("imagegpt", "c_attn", True), ("gpt2", "score", False),
     ("gpt_bigcode", "c_proj", False), (None, "c_proj", False)],
)  # fmt: skip
def test_square_weights_are_turned_where_the_configuration_says_so(
    model_type, name, turned, tmp_path
):
    path = single(tmp_path / "model.safetensors", **{f"h__0__{name}__weight": SQUARE})
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    got = read(path, f"h.0.{name}", (4, 4))
    assert torch.equal(got, SQUARE.mT if turned else SQUARE)


@pytest.mark.parametrize("transposed", [True, False])
def test_the_adapter_may_know_which_way_round_a_weight_is(transposed, tmp_path):
    path = single(tmp_path / "model.safetensors", h__0__c_proj__weight=SQUARE)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    got = read(path, "h.0.c_proj", (4, 4), transposed=transposed)
    assert torch.equal(got, SQUARE.mT if transposed else SQUARE)


@pytest.mark.parametrize("live", [True, False])
def test_what_the_base_model_knows_comes_before_what_peft_says_of_all_layers(live, tmp_path):
    """fan_in_fan_out is one field for Conv1D and Linear layers."""
    model = nn.ModuleDict({"c_proj": Conv1D(4, 4), "q_proj": nn.Linear(4, 4, bias=False)})
    base = model
    if not live:
        save_file(model.state_dict(), base := tmp_path / "model.safetensors")
        nested = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
        (tmp_path / "config.json").write_text(json.dumps(nested))
    hint = {"fan_in_fan_out": True}
    assert torch.equal(read(base, "q_proj", (4, 4), **hint), model.q_proj.weight)
    assert torch.equal(read(base, "c_proj", (4, 4), **hint), model.c_proj.weight.T)


@pytest.mark.parametrize("turned", [True, False])
def test_where_nothing_else_tells_peft_is_believed(turned, tmp_path):
    path = single(tmp_path / "other.safetensors", first__weight=SQUARE)
    got = read(path, "first", (4, 4), fan_in_fan_out=turned)
    assert torch.equal(got, SQUARE.mT if turned else SQUARE)


def test_one_layer_does_not_stand_for_those_of_all_blocks(tmp_path):
    path = single(tmp_path / "other.safetensors", q_proj__weight=torch.ones(4, 6))
    refused(IncompatibleError, path, "no such layer", module="layers.0.q_proj")
    assert read(path, "model.q_proj", (4, 6)).shape == (4, 6)


def test_a_file_and_the_directory_it_is_in_are_one_model(tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=SQUARE)
    assert base_model(path).source == base_model(tmp_path).source
    other = single(tmp_path / "other.safetensors", first__weight=SQUARE)
    assert base_model(other).source != base_model(path).source


def test_an_initialisation_that_changes_the_base_weights_is_refused():
    torch.manual_seed(0)
    host = get_peft_model(
        plain(), LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
    )
    for base in (host, host.base_model.model):
        refused(IncompatibleError, base, "pissa", "default", "first")
        assert read(base, "second", (4, 4)).shape == (4, 4)


def test_what_is_stored_the_other_way_round_is_not_taken_for_what_it_is_said_to_be(tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(6, 4))
    refused(IncompatibleError, path, "(4, 6)", "(6, 4)", transposed=False)
    assert read(path, "first", (4, 6)).shape == (4, 6)


def test_a_convolution_is_flattened_and_never_turned(tmp_path):
    kernel = torch.randn(4, 2, 3, 1)
    path = single(tmp_path / "model.safetensors", first__weight=kernel)
    assert torch.equal(read(path, "first", (4, 6)), kernel.flatten(1))
    refused(IncompatibleError, path, "(6, 4)", shape=(6, 4))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_weights_are_given_in_the_precision_asked_for(stored, wanted, tmp_path):
    weight = torch.randn(4, 6).to(stored)
    path = single(tmp_path / "model.safetensors", first__weight=weight)
    got = read(path, "first", (4, 6), wanted)
    assert got.dtype == wanted
    assert torch.equal(got, weight.to(wanted))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("live", [True, False])
def test_eight_bits_without_scales_are_widened(stored, live, tmp_path):
    base = plain()
    base.first.weight = nn.Parameter(base.first.weight.to(stored), requires_grad=False)
    weight = base.first.weight
    if not live:
        base = single(tmp_path / "model.safetensors", first__weight=weight.data)
    assert torch.equal(read(base, "first", (4, 6)), weight.float())
