"""Files as other trainers write them, key by key."""

import json

import torch

from support.golden_files.writing import (
    WAN,
    draw,
    golden,
    lora,
    lora_in,
    shape_in,
)
from support.models.pipelines import make_pipeline

PEFT = (".lora_B.weight", ".lora_A.weight")


@golden
def aitoolkit_flux():
    tensors = lora_in(
        "flux",
        """
        transformer.transformer_blocks.0.attn.to_q
        transformer.transformer_blocks.0.attn.add_k_proj
        transformer.transformer_blocks.1.ff.net.0.proj
        transformer.single_transformer_blocks.0.proj_mlp
        transformer.single_transformer_blocks.1.proj_out
        """,
        PEFT,
        ranks=(4,),
        dtype=torch.bfloat16,
    )
    return tensors, {"format": "pt", "name": "cat", "training_info": json.dumps({"step": 10})}


@golden
def aitoolkit_native_flux():
    tensors = lora_in(
        "flux",
        """
        diffusion_model.double_blocks.0.img_attn.qkv
        diffusion_model.double_blocks.1.txt_attn.proj
        diffusion_model.single_blocks.0.linear1
        diffusion_model.single_blocks.1.linear2
        """,
        PEFT,
        ranks=(4,),
        dtype=torch.float16,
    )
    return tensors, {"format": "pt"}


@golden
def aitoolkit_lokr():
    """Both halves full, and an alpha that means nothing: infinite in float16."""
    tensors = {}
    for name, (out, columns) in WAN.items():
        module_id = f"diffusion_model.{name}"
        tensors[module_id + ".lokr_w1"] = draw(module_id + " w1", 4, 4) / 4
        tensors[module_id + ".lokr_w2"] = draw(module_id + " w2", out // 4, columns // 4) / 4
        tensors[module_id + ".alpha"] = torch.tensor(9999999999.0)
    return {key: value.half() for key, value in tensors.items()}, {"format": "pt"}


@golden
def diffusion_pipe_wan():
    shapes = {"diffusion_model." + name: shape for name, shape in WAN.items()}
    return lora(shapes, PEFT, ranks=(4,), dtype=torch.bfloat16), {"format": "pt"}


@golden
def bare():
    return lora(WAN, PEFT, ranks=(3,), dtype=torch.float16), {}


@golden
def bare_without_weight():
    return lora(WAN, (".lora_B", ".lora_A"), ranks=(3,), dtype=torch.bfloat16), {}


@golden
def diffusers_old():
    attention = "unet.{}.transformer_blocks.0.{}.processor.{}"
    pipeline = make_pipeline("sd15")
    ids = [
        attention.format("down_blocks.0.attentions.0", "attn1", "to_q"),
        attention.format("down_blocks.0.attentions.0", "attn1", "to_out"),
        attention.format("mid_block.attentions.0", "attn2", "to_k"),
    ]
    unet = {i: shape_in(pipeline, i) for i in ids}
    i = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = {i: shape_in(pipeline, i)}
    tensors = lora(unet, ("_lora.up.weight", "_lora.down.weight"), ranks=(4,))
    tensors |= lora(encoder, (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"))
    return tensors, {"format": "pt"}


@golden
def xlabs_flux():
    tensors = lora_in(
        "flux",
        """
        double_blocks.0.processor.qkv_lora1
        double_blocks.0.processor.qkv_lora2
        double_blocks.0.processor.proj_lora1
        double_blocks.0.processor.proj_lora2
        """,
        (".up.weight", ".down.weight"),
        dtype=torch.bfloat16,
    )
    tensors |= lora_in(
        "flux",
        "single_blocks.0.processor.qkv single_blocks.1.processor.proj",
        ("_lora.up.weight", "_lora.down.weight"),
        dtype=torch.bfloat16,
    )
    return tensors, {}
