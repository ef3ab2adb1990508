"""Base models whose files are not what is computed with: transformers loads them."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from devec.base_model.model import base_model
from devec.errors import DevecWarning, IncompatibleError, UnsupportedError

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
WHOLE = pytest.mark.filterwarnings("ignore:the files of:devec.DevecWarning")


def read(base, module, shape):
    return base_model(base).weight(module, shape).read(torch.float32, CPU)


def linear_layers(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


@pytest.fixture
def vit(tmp_path):
    """A model that files know by other names than memory does, in recent transformers."""
    config = ViTConfig(image_size=8, patch_size=4, num_attention_heads=4, **SIZES)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    return model, tmp_path / "vit"


@WHOLE
def test_layers_are_found_by_the_names_they_have_in_memory(vit):
    model, folder = vit
    base = base_model(folder)
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight
        assert torch.equal(read(base, name, tuple(weight.shape)), weight)


def test_a_layer_of_neither_name_is_refused_without_loading_the_model(vit, recwarn):
    with pytest.raises(IncompatibleError, match="no such layer"):
        read(vit[1], "vit.layers.7.nowhere", (64, 64))
    assert not [w for w in recwarn if issubclass(w.category, DevecWarning)]


@WHOLE
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_checkpoints_are_dequantised_by_peft(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, **SIZES)
    LlamaForCausalLM(config).save_pretrained(plain)
    wanted = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted)
    model.save_pretrained(packed)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    assert not layer.weight.is_floating_point()
    with torch.no_grad():
        want = dequantize_module_weight(layer).float()
    assert torch.equal(read(packed, name, (64, 96)), want)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}, "cannot load"),
        ({}, "quantization_config"),
    ],
    ids=["unknown class", "broken", "no class"],
)
def test_what_transformers_cannot_load_is_refused(vit, config, reason):
    folder = vit[1]
    written = {"quantization_config": {"quant_method": "hqq"}, **config}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedError, match=reason) as refused:
        read(folder, "vit.layers.0.attention.o_proj", (64, 64))
    assert "base=model" in str(refused.value)
