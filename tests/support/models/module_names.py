"""What files call the modules of a pipeline."""

import re

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from support.models.pipelines import linear_modules, models_of

PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "unet_base_model_model_": "",
    "transformer_base_model_model_": "",
    "base_model_model_": "",
    "diffusion_model_": "",
    "unet_": "",
    "transformer_": "",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "text_encoder_2_": "text_encoder_2",
    "text_encoder_3_": "text_encoder_3",
    "text_encoder_": "text_encoder",
}

FLUX = {
    r"double_blocks_(\d+)_": {
        "img_attn_qkv": "attn_to_q attn_to_k attn_to_v",
        "txt_attn_qkv": "attn_add_q_proj attn_add_k_proj attn_add_v_proj",
        "img_attn_proj": "attn_to_out_0",
        "txt_attn_proj": "attn_to_add_out",
        "img_mlp_0": "ff_net_0_proj",
        "img_mlp_2": "ff_net_2",
        "txt_mlp_0": "ff_context_net_0_proj",
        "txt_mlp_2": "ff_context_net_2",
        "img_mod_lin": "norm1_linear",
        "txt_mod_lin": "norm1_context_linear",
        "processor_qkv_lora1": "attn_to_q attn_to_k attn_to_v",
        "processor_qkv_lora2": "attn_add_q_proj attn_add_k_proj attn_add_v_proj",
        "processor_proj_lora1": "attn_to_out_0",
        "processor_proj_lora2": "attn_to_add_out",
    },
    r"single_blocks_(\d+)_": {
        "linear1": "attn_to_q attn_to_k attn_to_v proj_mlp",
        "linear2": "proj_out",
        "modulation_lin": "norm_linear",
        "processor_qkv": "attn_to_q attn_to_k attn_to_v",
        "processor_proj": "proj_out",
    },
}

SD3 = {
    r"joint_blocks_(\d+)_": {
        "x_block_attn_qkv": "attn_to_q attn_to_k attn_to_v",
        "context_block_attn_qkv": "attn_add_q_proj attn_add_k_proj attn_add_v_proj",
        "x_block_attn_proj": "attn_to_out_0",
        "context_block_attn_proj": "attn_to_add_out",
        "x_block_mlp_fc1": "ff_net_0_proj",
        "x_block_mlp_fc2": "ff_net_2",
        "context_block_mlp_fc1": "ff_context_net_0_proj",
        "context_block_mlp_fc2": "ff_context_net_2",
        "x_block_adaLN_modulation_1": "norm1_linear",
        "context_block_adaLN_modulation_1": "norm1_context_linear",
    }
}

ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out"}

FUSED = {
    FluxTransformer2DModel: (FLUX, ("transformer_blocks", "single_transformer_blocks")),
    SD3Transformer2DModel: (SD3, ("transformer_blocks",)),
}

RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}

SGM = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def _from_sgm(name):
    """The diffusers name of a module of a UNet with three levels and two layers a block."""
    if name in SGM:
        return SGM[name]
    if found := re.fullmatch(r"middle_block_(\d)_(.+)", name):
        part = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}[found[1]]
        return f"mid_block_{part}_{RESNET.get(found[2], found[2])}"
    if not (found := re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)):
        return name
    side, block, part, rest = found.groups()
    down = side == "input"
    level, layer = divmod(int(block) - down, 3)
    start = f"{'down' if down else 'up'}_blocks_{level}"
    if rest in ("op", "conv"):
        return f"{start}_{'down' if down else 'up'}samplers_0_conv"
    kind = "resnets" if part == "0" else "attentions"
    return f"{start}_{kind}_{layer}_{RESNET.get(rest, rest)}"


def _from_fused(name, table, blocks):
    """The diffusers names of the modules that a module of Flux or SD3 is made of, in its order."""
    for (pattern, names), block in zip(table.items(), blocks, strict=True):
        if (found := re.match(pattern, name)) and name[found.end() :] in names:
            return [f"{block}_{found[1]}_{n}" for n in names[name[found.end() :]].split()]
    return [ENDS.get(name, name)]


def find_modules(pipeline, module_id):
    """The modules that an id of a file speaks of: several where it fuses them, in order of rows.

    Raises:
        KeyError: If the pipeline has no such module.
    """
    models = models_of(pipeline)
    name = module_id.replace(".", "_")
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    component = PREFIXES.get(prefix) or next(iter(models))
    if component == "text_encoder_3" and component not in models:
        component = "text_encoder_2"  # T5 is the second encoder of Flux and the third of SD3
    model = models[component]
    name = name.removeprefix(prefix).removeprefix("text_model_")
    if type(model) in FUSED:
        names = _from_fused(name, *FUSED[type(model)])
    elif isinstance(model, UNet2DConditionModel):
        name = re.sub(r"_processor_(to_[qkvout]+)$", r"_\1", name)
        names = [_from_sgm(re.sub(r"_to_out$", "_to_out_0", name))]
    else:
        names = [name]
    flat = {
        n.replace(".", "_").removeprefix("text_model_"): module
        for n, module in linear_modules(model).items()
    }
    return [flat[n] for n in names]


@torch.no_grad()
def add_deltas(pipeline, deltas):
    """Adds dense ΔW, given by the ids of a file, to the weights of the pipeline.

    Args:
        pipeline: A pipeline without adapters; changed in place.
        deltas: Id → ΔW `(out, in·kh·kw)`, an array.
    """
    for module_id, delta in deltas.items():
        modules = find_modules(pipeline, module_id)
        rows = torch.as_tensor(delta).split([len(m.weight) for m in modules])
        for module, part in zip(modules, rows, strict=True):
            module.weight += part.reshape(module.weight.shape).to(module.weight)
