"""Base weights of models in memory: inside of adapters, quantised, on no device."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from devec.base_model.model import base_model
from devec.errors import IncompatibleError, UnsupportedError
from support.checks.base_weights import (
    UNQUANTISED,
    layers,
    pipeline,
    plain,
    quantised,
    read,
    refused,
)
from support.models.module_names import find_modules
from support.models.pipelines import make_pipeline

CPU = torch.device("cpu")


def with_head():
    torch.manual_seed(4)
    return plain(head=nn.Linear(4, 3), table=nn.Embedding(5, 4))


def with_adapter(**fields):
    host = with_head()
    targets = ["first", "table"]
    return get_peft_model(host, LoraConfig(r=2, target_modules=targets, **fields))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("module", ["first", "second", "table", "head", "base_model.model.first"])
def test_the_base_layers_of_a_model_with_adapters(module, wrapped):
    host = with_adapter(modules_to_save=["head"])
    expected = layers(with_head())
    weight = expected[module.removeprefix("base_model.model.")]
    base = host if wrapped else host.base_model.model
    assert torch.equal(read(base, module, weight.shape), weight)
    assert base_model(host).source == base_model(host.base_model.model).source


def test_attention_inside_of_an_adapter():
    attention = nn.MultiheadAttention(4, 2)
    host = get_peft_model(plain(attn=attention), LoraConfig(r=2, target_modules=["attn"]))
    got = read(host, "attn.out_proj", (4, 4))
    assert torch.equal(got, host.base_model.model.attn.base_layer.out_proj.base_layer.weight)


def test_a_merged_adapter_is_refused_until_it_is_taken_out():
    host = with_adapter(init_lora_weights=False)
    base, before = base_model(host), read(host, "first", (4, 6)).clone()
    host.merge_adapter()
    refused(IncompatibleError, base, "merged", "default", "unmerge_adapter")
    assert read(base, "second", (4, 4)).shape == (4, 4)
    host.unmerge_adapter()
    torch.testing.assert_close(read(base, "first", (4, 6)), before)


def test_an_adapter_of_a_pipeline_that_is_in_use_is_no_part_of_its_weights():
    pipe = make_pipeline("sd15")
    (module,) = find_modules(pipe, "lora_unet_mid_block_attentions_0_proj_in")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False))
    got = read(pipe, "unet.mid_block.attentions.0.proj_in", module.weight.flatten(1).shape)
    assert torch.equal(got, module.weight.flatten(1))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers_are_dequantised_by_peft(kind):
    layer = quantised(kind)
    got = read(plain(first=layer), "first", (32, 64))
    assert got.shape == (32, 64)
    error = float((got - UNQUANTISED["weight"]).abs().max())
    assert 0 < error < (0.03 if kind == "Linear4bit" else 1e-3)
    adapted = get_peft_model(plain(first=layer), LoraConfig(r=2, target_modules=["first"]))
    assert torch.equal(read(adapted, "first", (32, 64)), got)
    # the layer multiplies by this very weight
    eye = layer(torch.eye(64)) - layer.bias
    torch.testing.assert_close(eye.mT, got, atol=2e-3, rtol=0.02)
    # and does so after it was read once more
    assert torch.equal(read(plain(first=layer), "first", (32, 64)), got)
    assert torch.equal(layer(torch.eye(64)) - layer.bias, eye)


def test_a_layer_that_is_yet_to_be_quantised_is_read_as_it_is():
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(UNQUANTISED)
    assert torch.equal(read(plain(first=layer), "first", (32, 64)), UNQUANTISED["weight"])


class Packed(nn.Module):
    """A layer as GPTQ has them."""

    in_features, out_features = 6, 4

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(3, 4, dtype=torch.int32))


class Scaled(nn.Linear):
    """A layer with eight bits and a scale."""

    def __init__(self):
        super().__init__(6, 4, bias=False)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", torch.ones(1))


class Integers(nn.Module):
    """A layer with integers, of which nobody says what they mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [Packed, Scaled, Integers])
def test_what_peft_cannot_dequantise_is_refused(kind):
    refused(UnsupportedError, plain(first=kind()), "without quantisation")


def test_what_is_not_in_memory_is_refused():
    base = plain(first=nn.Linear(6, 4, device="meta"))
    refused(UnsupportedError, base, "not in memory", "without offloading")


def test_a_pipeline_of_two_denoisers_leaves_open_which_is_meant():
    class Pipeline:
        components = {"transformer": plain(), "transformer_2": plain(), "vae": None}  # noqa: RUF012

    refused(IncompatibleError, Pipeline(), "two denoisers")


def test_a_text_encoder_that_the_base_model_lacks():
    parts = "first text encoder (CLIP-L)", "second text encoder (CLIP-G)"
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    refused(IncompatibleError, pipeline("sd15"), *parts, module=module, shape=(16, 8))
