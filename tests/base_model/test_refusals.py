"""A base model that does not fit the adapter is refused, and what would fit is said."""

import pytest
import torch
from safetensors.torch import save_file

from devec.base_model.model import base_model
from devec.deltas.gains import zero_gain
from devec.errors import DevecError, FormatError, IncompatibleError, UnsupportedError
from support.checks.base_weights import (
    family,
    plain,
    quantised,
    refused,
    single,
)

CPU = torch.device("cpu")


def test_without_a_base_model_the_remedy_is_said():
    refused(IncompatibleError, None, "diag(m/", "base=MODEL", "--base MODEL", ".safetensors")


@pytest.mark.parametrize("base", [None, "no such path"])
def test_the_base_model_on_record_is_suggested(base):
    handle = base_model(base, "user/base").weight("first", (4, 6))
    with pytest.raises(DevecError, match="trained on 'user/base'"):
        handle.read(torch.float32, CPU)


@pytest.mark.parametrize("base", [3, ["a"], {"first.weight": torch.ones(4, 6)}])
def test_an_object_that_is_no_model_is_refused_at_once(base):
    with pytest.raises(IncompatibleError, match=f"loaded model; got {type(base).__name__}"):
        base_model(base)


def test_a_module_that_the_base_model_lacks(saved):
    module, near = "unet.mid_block.attentions.0.proj_inn", "mid_block.attentions.0.proj_in"
    refused(IncompatibleError, saved("sd15") / "unet", near, "unet", module=module)


def test_a_module_of_which_there_could_be_several(tmp_path):
    path = single(
        tmp_path / "model.safetensors",
        text__layers__0__q__weight=torch.ones(4, 6),
        vision__layers__0__q__weight=torch.ones(4, 6),
    )
    parts = "several", "text.layers.0.q", "vision.layers.0.q"
    refused(IncompatibleError, path, *parts, module="layers.0.q")


@pytest.mark.parametrize("shape", [(4, 5), (8, 6), (3, 8)])
def test_another_shape_than_the_adapter_wants(shape, tmp_path):
    path = single(tmp_path / "model.safetensors", first__weight=torch.ones(4, 6))
    parts = str(shape), "(4, 6)", "not the base model", "model.safetensors"
    refused(IncompatibleError, path, *parts, shape=shape)


@pytest.mark.parametrize("rows", [48, 49])
def test_rows_of_a_fused_layer_that_do_not_fit(rows, tmp_path):
    name = "double_blocks.0.img_attn.qkv"
    path = single(tmp_path / "flux.safetensors", **{f"{name}.weight": torch.ones(rows, 16)})
    module = "transformer.transformer_blocks.0.attn.to_q"
    parts = "not the base model", name, "flux.safetensors"
    refused(IncompatibleError, path, *parts, module=module, shape=(15, 16), family=family("flux"))


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, live, tmp_path):
    base = plain()
    base.first.weight[1, 2] = value
    if not live:
        save_file(base.state_dict(), path := tmp_path / "model.safetensors")
        base = path
    weight = base_model(base).weight("first", (4, 6))
    with pytest.raises(FormatError, match="NaN or infinity in 1 of its rows"):
        zero_gain(torch.ones(2, 6), weight)


def test_open_clip_has_other_names(checkpoint):
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    refused(UnsupportedError, checkpoint("sdxl"), "OpenCLIP", "model_index.json", module=module)


def _state(folder, **tensors):
    return single(folder / "model.safetensors", **tensors)


def _four_bits(folder):
    save_file(
        {f"first.{k}": v.contiguous() for k, v in quantised("Linear4bit").state_dict().items()},
        path := folder / "model.safetensors",
    )
    return path


def _eight_bits(folder):
    state = quantised("Linear8bitLt").state_dict()
    state = {f"first.{k}": torch.as_tensor(v) for k, v in state.items()}
    save_file(state, path := folder / "model.safetensors")
    return path


def _gptq(folder):
    packed = torch.ones(3, 4, dtype=torch.int32)
    return _state(folder, first__qweight=packed, first__scales=torch.ones(1, 4))


def _scaled(folder):
    weight = torch.ones(4, 6).to(torch.float8_e4m3fn)
    return _state(folder, first__weight=weight, first__scale_weight=torch.ones(1))


def _said_by_the_configuration(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    return _state(folder, first__weight=torch.ones(4, 6))


QUANTISED = [_four_bits, _eight_bits, _gptq, _scaled, _said_by_the_configuration]


@pytest.mark.parametrize("made", QUANTISED)
def test_quantised_files_are_refused(made, tmp_path):
    refused(UnsupportedError, made(tmp_path), "quantised", "base=model", "model.safetensors")
