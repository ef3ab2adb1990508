"""Files as kohya's scripts, musubi, OneTrainer and web interfaces write them."""

import hashlib
import json

import torch
from safetensors.torch import save

from support.golden_files.writing import (
    WAN,
    draw,
    factors,
    golden,
    lora,
    lora_in,
    shape_in,
)
from support.models.pipelines import make_pipeline

KOHYA = (".lora_up.weight", ".lora_down.weight")


def kohya_metadata(tensors, name, dim, alpha, base, architecture, **more):
    """What sd-scripts writes into the header, hashes and all."""
    training = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(dim),
        "ss_network_alpha": str(float(alpha)),
        "ss_output_name": name,
        "ss_base_model_version": base,
        "ss_v2": "False",
        "ss_resolution": "(64, 64)",
        "ss_tag_frequency": json.dumps({"1_cat": {"cat": 3, "sitting": 2}}),
        **more,
    }
    data = save(tensors, training)
    content = data[8 + int.from_bytes(data[:8], "little") :]
    window = data[0x100000 : 0x100000 + 0x10000]
    return {
        **training,
        "sshs_model_hash": hashlib.sha256(content).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.date": "2024-03-01T12:00:00",
        "modelspec.resolution": "64x64",
    }


@golden
def kohya_sd15():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_proj_in
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k
        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0
        lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj
        lora_te_text_model_encoder_layers_0_self_attn_out_proj
        lora_te_text_model_encoder_layers_1_mlp_fc1
        """,
        KOHYA,
        ranks=(4,),
        alpha=3,
        dtype=torch.float16,
    )
    tensors |= lora_in(
        "sd15",
        "lora_unet_down_blocks_0_resnets_0_conv1 lora_unet_down_blocks_1_downsamplers_0_conv",
        KOHYA,
        ranks=(2,),
        alpha=1,
        dtype=torch.float16,
    )
    args = json.dumps({"conv_dim": "2", "conv_alpha": "1"})
    architecture = "stable-diffusion-v1/lora"
    return tensors, kohya_metadata(
        tensors, "cat_sd15", 4, 3, "sd_v1", architecture, ss_network_args=args
    )


@golden
def kohya_sdxl():
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_input_blocks_4_1_proj_in
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
        lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_v
        lora_unet_middle_block_1_transformer_blocks_0_ff_net_2
        lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_out_0
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_mlp_fc2
        """,
        KOHYA,
        ranks=(4, 2),
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, kohya_metadata(
        tensors, "cat_sdxl", 4, 1, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"
    )


@golden
def kohya_sdxl_conv():
    """Every kind of module outside attention, under its sgm name."""
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_input_blocks_1_0_in_layers_2
        lora_unet_input_blocks_3_0_op
        lora_unet_input_blocks_4_0_emb_layers_1
        lora_unet_input_blocks_4_0_skip_connection
        lora_unet_middle_block_2_out_layers_3
        lora_unet_output_blocks_2_2_conv
        lora_unet_output_blocks_7_0_in_layers_2
        lora_unet_label_emb_0_0
        lora_unet_time_embed_2
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl"}


@golden
def onetrainer_sdxl():
    tensors = lora_in(
        "sdxl",
        """
        lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_2_attentions_1_transformer_blocks_1_attn2_to_v
        lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2
        lora_unet_down_blocks_1_resnets_0_conv_shortcut
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        lora_te2_text_model_encoder_layers_1_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


FLUX_DOUBLE = """
    lora_unet_double_blocks_0_img_attn_qkv
    lora_unet_double_blocks_0_txt_attn_qkv
    lora_unet_double_blocks_1_img_attn_proj
    lora_unet_double_blocks_1_txt_mlp_0
    lora_unet_double_blocks_1_img_mod_lin
    lora_unet_single_blocks_0_linear2
    lora_unet_single_blocks_1_modulation_lin
    lora_te1_text_model_encoder_layers_0_self_attn_out_proj
"""


@golden
def kohya_flux():
    """Without `linear1`: what diffusers splits by the sizes of the real model only."""
    tensors = lora_in("flux", FLUX_DOUBLE, KOHYA, alpha=4, dtype=torch.bfloat16)
    return tensors, kohya_metadata(tensors, "cat_flux", 2, 4, "flux1", "flux-1-dev/lora")


@golden
def kohya_flux_single():
    tensors = lora_in(
        "flux",
        """
        lora_unet_double_blocks_0_img_attn_qkv
        lora_unet_single_blocks_0_linear1
        lora_unet_single_blocks_1_linear1
        lora_unet_single_blocks_1_linear2
        lora_te1_text_model_encoder_layers_1_mlp_fc2
        lora_te3_encoder_block_0_layer_0_SelfAttention_q
        lora_te3_encoder_block_1_layer_1_DenseReluDense_wo
        """,
        KOHYA,
        ranks=(2, 3),
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}


@golden
def kohya_flux_split_qkv():
    """Block-diagonal up, rank 3 × 2, alpha as for rank 2: what `split_qkv` saves."""
    pipeline = make_pipeline("flux")
    tensors = {}
    for name in ("img_attn_qkv", "txt_attn_qkv"):
        module_id = f"lora_unet_double_blocks_0_{name}"
        rows, columns = shape_in(pipeline, module_id)
        parts = [factors(f"{module_id} {n}", (rows // 3, columns), 2) for n in "qkv"]
        tensors[module_id + ".lora_up.weight"] = torch.block_diag(*(up for up, _ in parts))
        tensors[module_id + ".lora_down.weight"] = torch.cat([down for _, down in parts])
        tensors[module_id + ".alpha"] = torch.tensor(2.0)
    args = json.dumps({"split_qkv": "True"})
    return tensors, {"ss_network_module": "networks.lora_flux", "ss_network_args": args}


@golden
def kohya_sd3():
    tensors = lora_in(
        "sd3",
        """
        lora_unet_joint_blocks_0_x_block_attn_qkv
        lora_unet_joint_blocks_0_context_block_attn_qkv
        lora_unet_joint_blocks_1_x_block_attn_proj
        lora_unet_joint_blocks_1_context_block_mlp_fc1
        lora_unet_joint_blocks_2_context_block_attn_qkv
        lora_unet_joint_blocks_2_x_block_mlp_fc2
        lora_te1_text_model_encoder_layers_0_self_attn_k_proj
        lora_te2_text_model_encoder_layers_1_mlp_fc1
        lora_te3_encoder_block_0_layer_0_SelfAttention_q
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    return tensors, {"ss_network_module": "networks.lora_sd3", "ss_base_model_version": "sd3"}


@golden
def musubi_wan():
    shapes = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in WAN.items()}
    tensors = lora(shapes, KOHYA, ranks=(4,), alpha=1, dtype=torch.bfloat16)
    return tensors, {
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "4",
        "ss_network_alpha": "1",
        "ss_base_model_version": "wan",
    }


@golden
def onetrainer_flux():
    tensors = lora_in(
        "flux",
        """
        lora_transformer_transformer_blocks_0_attn_to_q
        lora_transformer_transformer_blocks_1_attn_add_v_proj
        lora_transformer_transformer_blocks_1_attn_to_out_0
        lora_transformer_single_transformer_blocks_0_attn_to_k
        lora_transformer_context_embedder
        lora_te1_text_model_encoder_layers_0_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.bfloat16,
    )
    return tensors, {"modelspec.architecture": "Flux.1-dev/lora"}


@golden
def a1111_scale():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k
        """,
        KOHYA,
        alpha=1,
    )
    first = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[first + ".scale"] = torch.tensor(0.75)
    return tensors, {}


@golden
def bundled_embeddings():
    tensors = lora_in(
        "sdxl",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        KOHYA,
        alpha=1,
        dtype=torch.float16,
    )
    for encoder, width in ("clip_l", 8), ("clip_g", 12):
        tensors[f"bundle_emb.cat.{encoder}"] = draw(encoder, 2, width).half()
    return tensors, {}


@golden
def float8():
    tensors = lora_in(
        "sd15",
        """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
        lora_unet_down_blocks_0_resnets_0_conv1
        lora_te_text_model_encoder_layers_0_self_attn_out_proj
        """,
        KOHYA,
        alpha=1,
        dtype=torch.float8_e4m3fn,
    )
    return tensors, {"ss_network_module": "networks.lora"}
