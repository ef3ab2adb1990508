"""Files that are odd but plausible: their effect is kept, or they are refused, never changed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from devec import Adapter, DevecError, combine, convert, decompose, distance
from support.truth.golden_truth import dense_truth

pytestmark = pytest.mark.filterwarnings("ignore::devec.DevecWarning")

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def pair(module, rows, columns, rank=2, up=".lora_B.weight", down=".lora_A.weight"):
    return {module + up: torch.randn(rows, rank), module + down: torch.randn(rank, columns)}


def kohya(module, rows, columns, rank=2):
    tensors = pair(module, rows, columns, rank, ".lora_up.weight", ".lora_down.weight")
    return {**tensors, f"{module}.alpha": torch.tensor(1.0)}


def save(path, *parts, **metadata):
    save_file({k: t.clone() for part in parts for k, t in part.items()}, path, metadata or None)
    return Adapter.from_pretrained(path)


@pytest.fixture
def swapped(tmp_path):
    """The final layer of Flux, whose halves diffusers swaps, in both conventions."""
    a = save(
        tmp_path / "a.safetensors",
        kohya("lora_unet_final_layer_adaLN_modulation_1", 32, 16),
        kohya("lora_unet_double_blocks_0_img_attn_qkv", 48, 16),
    )
    b = save(
        tmp_path / "b.safetensors",
        pair("transformer.norm_out.linear", 32, 16),
        pair("transformer.transformer_blocks.0.attn.to_k", 16, 16),
    )
    return a, b


def rows_of_final_layer(adapter, path):
    """ΔW of the final layer in the order of the model's authors, through a file."""
    truth = dense_truth(convert(adapter, "kohya").save_pretrained(path, dtype=torch.float32))
    assert not any(":" in key for key in truth)
    return truth["lora_unet_final_layer_adaLN_modulation_1"]


def test_swapped_halves_survive_being_aligned_again(tmp_path, swapped):
    a, b = swapped
    once = combine([a, b], [1, 1])
    A = dense_truth(tmp_path / "a.safetensors")["lora_unet_final_layer_adaLN_modulation_1"]
    B = dense_truth(tmp_path / "b.safetensors")["transformer.norm_out.linear"]
    want = A + np.concatenate([B[16:], B[:16]])
    got = rows_of_final_layer(once, tmp_path / "once")
    assert np.allclose(got, want, rtol=0, atol=1e-6 * abs(want).max())
    twice = combine([once, a], [1, -1])
    left = rows_of_final_layer(twice, tmp_path / "twice")
    assert np.allclose(left, want - A, rtol=0, atol=1e-6 * abs(want).max())
    parts = decompose([a, b], threshold=0.01)
    back = combine([parts.shared["b"], parts.unique["b"]], [1, 1])
    assert distance(back, b) <= 1e-6 * b.norm()


def test_files_of_several_styles_are_written_in_one(tmp_path):
    old = pair(f"unet.{UNET}.processor.to_q", 8, 8, up="_lora.up.weight", down="_lora.down.weight")
    a = save(tmp_path / "a.safetensors", old, pair(f"unet.{UNET}.to_k", 8, 8))
    flat = f"lora_unet_{UNET.replace('.', '_')}_to_v"
    b = save(tmp_path / "b.safetensors", kohya(flat, 8, 8))
    keys = load_file(combine([a, b], [1, 1]).save_pretrained(tmp_path / "c")).keys()
    layers = [f"unet.{UNET}.to_{name}.lora_{factor}.weight" for name in "qkv" for factor in "AB"]
    assert sorted(keys) == sorted(layers)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            pair(f"unet.{UNET}.processor.to_q", 8, 8, 2, "_lora.up.weight", "_lora.down.weight"),
            pair(f"unet.{UNET}.to_q", 8, 8),
        ),
        (kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 8),
         kohya("lora_te_encoder_layers_0_mlp_fc1", 8, 8)),
        (kohya("lora_unet_mid_block_x", 8, 8), pair("unet.mid_block.x", 8, 8)),
    ],
    ids=["processor", "text_model", "prefix"],
)  # fmt: skip
def test_two_names_of_one_module_are_refused(tmp_path, first, second):
    with pytest.raises(DevecError, match="two names of one module"):
        save(tmp_path / "a.safetensors", first, second)


LOKR = {"m.lokr_w1": torch.randn(2, 2), "m.lokr_w2": torch.randn(4, 4)}


@pytest.mark.parametrize(
    "strange",
    [
        pair("m", 8, 8, up=".lora_up.weight", down=".lora_down.weight"),
        {"m.lora_mid.weight": torch.randn(2, 2, 3, 3)},
        {"m.lokr_t2": torch.randn(2, 2, 3, 3)},
        {"m.hada_t1": torch.randn(2, 2, 3, 3)},
    ],
    ids=["pair", "mid", "core", "LoHa"],
)
def test_parts_of_two_kinds_in_one_module_are_refused(tmp_path, strange):
    with pytest.raises(DevecError, match=r"two kinds of change|both lokr_w2 and factors|no hada"):
        save(tmp_path / "a.safetensors", LOKR, strange)


@pytest.mark.parametrize(
    ("base", "module"),
    [
        ("Qwen/Qwen-Image", "lora_unet_transformer_blocks_45_attn_to_q"),
        ("black-forest-labs/FLUX.1-dev", "lora_unet_double_blocks_45_img_attn_qkv"),
        ("hunyuanvideo-community/HunyuanVideo", "lora_unet_double_blocks_45_img_attn_qkv"),
    ],
)
def test_metadata_decide_between_families_that_share_names(tmp_path, base, module):
    path = tmp_path / "a.safetensors"
    layer = pair("transformer.transformer_blocks.45.attn.to_q", 3072, 3072, 1)
    adapter = save(path, layer, base_model_name_or_path=base)
    keys = load_file(convert(adapter, "kohya").save_pretrained(tmp_path / "b"))
    assert all(key.startswith(module) for key in keys)


def test_an_unknown_base_model_is_asked_for(tmp_path):
    adapter = save(
        tmp_path / "a.safetensors",
        pair("transformer.transformer_blocks.45.attn.to_q", 3072, 3072, 1),
    )
    with pytest.raises(DevecError, match="--base MODEL"):
        convert(adapter, "kohya").save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("component", ["clip_l", "clip_g"])
def test_text_encoders_come_back_from_peft(tmp_path, component):
    prefix = {"clip_l": "lora_te1_", "clip_g": "lora_te2_"}[component]
    module = f"{prefix}text_model_encoder_layers_0_self_attn_q_proj"
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    a = save(tmp_path / "a.safetensors", kohya(module, 8, 8), kohya(unet, 8, 8))
    peft = convert(a, "peft", component=component).save_pretrained(tmp_path / "peft")
    read = Adapter.from_pretrained(peft)
    read = dataclasses.replace(read, layout=read.layout.rebased("sdxl"))
    back = convert(read, "kohya", component=component).save_pretrained(tmp_path / "back")
    truth = dense_truth(back)
    assert list(truth) == [module]
    want = dense_truth(tmp_path / "a.safetensors")[module]
    assert np.allclose(truth[module], want, rtol=0, atol=1e-6 * abs(want).max())


def test_changes_of_biases_are_whole_in_kohyas_files(tmp_path):
    module = f"unet.{UNET}.to_out.0"
    bias = {f"{module}.lora_B.bias": torch.randn(8)}
    config = {"unet.r": 2, "unet.lora_alpha": 6}
    a = save(
        tmp_path / "a.safetensors", pair(module, 8, 8), bias,
        lora_adapter_metadata=json.dumps(config), base_model_name_or_path="stable-diffusion-v1-5",
    )  # fmt: skip
    tensors = load_file(convert(a, "kohya").save_pretrained(tmp_path / "b"))
    name = f"lora_unet_{UNET.replace('.', '_')}_to_out_0"
    torch.testing.assert_close(tensors[f"{name}.diff_b"], 3 * bias[f"{module}.lora_B.bias"])


@pytest.mark.parametrize("wanted", ["diffusers", "peft"])
@pytest.mark.parametrize("pooled", [False, True])
def test_whole_tensors_go_only_where_they_are_read(tmp_path, wanted, pooled):
    flat = f"lora_unet_{UNET.replace('.', '_')}_to_q"
    a = save(tmp_path / "a.safetensors", kohya(flat, 8, 8), {f"{flat}.diff_b": torch.randn(8)})
    b = save(tmp_path / "b.safetensors", pair(f"unet.{UNET}.to_q", 8, 8))
    result = decompose([a, b]).unique["a"] if pooled else a
    assert result.carried
    with pytest.raises(DevecError, match="diff_b"):
        convert(result, wanted).save_pretrained(tmp_path / "c")


def test_factors_of_embeddings_are_refused_by_name(tmp_path):
    layer = {f"base_model.model.tokens.lora_embedding_{f}": torch.randn(2, 2) for f in "AB"}
    with pytest.raises(DevecError, match="LoRA of an embedding"):
        save(tmp_path / "a.safetensors", layer, pair("base_model.model.x", 8, 8))


def test_headers_have_the_defaults_of_peft(tmp_path):
    config = json.dumps({"unet.r": 4, "unet.target_modules": ["to_q"]})
    layer = pair(f"unet.{UNET}.to_q", 8, 8, 4)
    adapter = save(tmp_path / "a.safetensors", layer, lora_adapter_metadata=config)
    assert {delta.scaling for delta in adapter.modules.values()} == {2.0}


@pytest.mark.parametrize("width", [768, 1024])
def test_flattened_projections_are_convolutions_in_sd1_alone(tmp_path, width):
    block = "lora_unet_down_blocks_0_attentions_0"
    halves = {f"{block}_proj_in.hada_w{i}_{c}": torch.randn(8, 8)[:: 4 if c == "b" else 1,
              :: 4 if c == "a" else 1] for i in (1, 2) for c in "ab"}  # fmt: skip
    halves = {key: tensor.contiguous() for key, tensor in halves.items()}
    layer = kohya(f"{block}_transformer_blocks_0_attn2_to_k", 8, width)
    adapter = save(tmp_path / "a.safetensors", halves, layer)
    tensors = load_file(adapter.save_pretrained(tmp_path / "b"))
    assert tensors[f"{block}_proj_in.lora_down.weight"].ndim == (4 if width == 768 else 2)


def test_adapters_of_whole_tensors_alone_stay_whole(tmp_path):
    flat = f"lora_unet_{UNET.replace('.', '_')}_to_q"
    a = save(tmp_path / "a.safetensors", {f"{flat}.diff": torch.randn(8, 8)})
    b = save(tmp_path / "b.safetensors", kohya(flat, 8, 8))
    parts = decompose([a, b])
    assert list(parts.outputs()) == ["a-unique", "b-unique"]
    written = load_file(parts.unique["a"].save_pretrained(tmp_path / "c"))
    assert list(written) == [f"{flat}.diff"]
    assert a.layout.about.format == "kohya"


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"version https://git-lfs", "Git LFS"),
        (b"", "is empty"),
    ],
)
def test_downloads_that_failed_are_told(tmp_path, start, what):
    (tmp_path / "a.safetensors").write_bytes(start)
    with pytest.raises(DevecError, match=what):
        Adapter.from_pretrained(tmp_path / "a.safetensors")


def test_similar_names_are_suggested(tmp_path):
    save(tmp_path / "anime.safetensors", kohya("lora_unet_mid_block_x", 8, 8))
    with pytest.raises(DevecError, match=r"did you mean '.*anime.safetensors'"):
        Adapter.from_pretrained(tmp_path / "anmie")


def test_kohya_to_kohya_changes_nothing(tmp_path):
    a = save(
        tmp_path / "a.safetensors",
        kohya(f"lora_unet_{UNET.replace('.', '_')}_to_q", 8, 8),
        {
            **kohya("lora_unet_mid_block_y", 8, 8, 4),
            "lora_unet_mid_block_y.alpha": torch.tensor(3.0),
        },
    )
    written = load_file(convert(a, "kohya").save_pretrained(tmp_path / "b"))
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in read.items())


def test_naming_the_base_model_says_whose_names_are_used(tmp_path):
    """Ends alone have names in several families; the base model tells them apart."""
    a = save(tmp_path / "a.safetensors", kohya("lora_unet_t_embedder_mlp_0", 8, 8),
             kohya("lora_unet_x_embedder", 8, 8))  # fmt: skip
    named = dataclasses.replace(a, layout=a.layout.rebased("Tongyi-MAI/Z-Image-Turbo"))
    b = save(tmp_path / "b.safetensors", pair("transformer.all_x_embedder.2-1", 8, 8))
    total = combine([named, b], [1, 1])
    truth = dense_truth(total.save_pretrained(tmp_path / "c", dtype=torch.float32))
    ours = dense_truth(tmp_path / "a.safetensors")["lora_unet_x_embedder"]
    theirs = dense_truth(tmp_path / "b.safetensors")["transformer.all_x_embedder.2-1"]
    assert np.allclose(truth["lora_unet_x_embedder"], ours + theirs, rtol=0, atol=1e-5)
