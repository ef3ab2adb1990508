"""Tiny pipelines of diffusers with the structure of the real ones, and random weights.

Block by block the layout is that of the models in use: the same levels, the same kinds of blocks,
the same joints between them; only widths and depths are smaller. Nothing is downloaded.

`CLIPTextModel` of transformers ≥ 5.6 has no `text_model` inside, while
`CLIPTextModelWithProjection` still has: files keep the old names, and diffusers strips the prefix
where the model lacks it.
"""

import re

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

VOCABULARY, TOKENS = 40, 5
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _clip(kind, hidden, projection=8):
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )


def _t5(hidden):
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=hidden,
            d_kv=4,
            d_ff=2 * hidden,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _sd15():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=_clip(CLIPTextModel, 12),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=8 + 12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=_clip(CLIPTextModel, 8),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 12, projection=8),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


def _flux():
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=_clip(CLIPTextModel, 8),
        tokenizer=None,
        text_encoder_2=_t5(12),
        tokenizer_2=None,
        transformer=transformer,
    )


def _sd3():
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=_clip(CLIPTextModelWithProjection, 8),
        tokenizer=None,
        text_encoder_2=_clip(CLIPTextModelWithProjection, 12, projection=12),
        tokenizer_2=None,
        text_encoder_3=_t5(24),
        tokenizer_3=None,
    )


PIPELINES = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "sd3": _sd3}


def _models(pipeline):
    """Name → denoiser and text encoders, the denoiser first."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    found = {n: getattr(pipeline, n, None) for n in (name, *ENCODERS)}
    return {n: model for n, model in found.items() if model is not None}


def make_pipeline(kind):
    """The pipeline of a kind ("sd15", "sdxl", "flux" or "sd3"), the same each time.

    Weights are drawn with variance 1/fan-in, so that every module has an effect one can see: at the
    initialisation of CLIP, attention would hardly change what comes out.
    """
    pipeline = PIPELINES[kind]()
    generator = torch.Generator().manual_seed(5)
    for model in _models(pipeline).values():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.data = draw / parameter[0].numel() ** 0.5
            elif name.endswith("bias"):
                parameter.data = draw / 8
        model.eval().requires_grad_(False)
    return pipeline


@torch.no_grad()
def run(pipeline):
    """Name → output of the denoiser and of every text encoder, on inputs that stay the same."""
    models = _models(pipeline)
    generator = torch.Generator().manual_seed(11)
    name, denoiser = next(iter(models.items()))

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(next(denoiser.parameters()))

    outputs = {name: _denoise(denoiser, draw)}
    tokens = torch.arange(TOKENS)[None] + 3
    tokens[:, -1] = VOCABULARY - 1
    for name in models.keys() - outputs.keys():
        found = models[name](tokens)
        outputs[name] = found.last_hidden_state
        if getattr(found, "text_embeds", None) is not None:
            outputs[f"{name}.text_embeds"] = found.text_embeds
    return dict(sorted(outputs.items()))


def _denoise(model, draw):
    """The output of a denoiser for one noisy sample at one time."""
    c = model.config
    time = torch.tensor([3])
    if isinstance(model, UNet2DConditionModel):
        more = {}
        if c.addition_embed_type == "text_time":
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            more = {
                "added_cond_kwargs": {"text_embeds": draw(1, pooled), "time_ids": 8 * draw(1, 6)}
            }
        text = draw(1, TOKENS, c.cross_attention_dim)
        return model(draw(1, 4, 8, 8), time, text, **more).sample
    text, pooled = draw(1, TOKENS, c.joint_attention_dim), draw(1, c.pooled_projection_dim)
    if isinstance(model, SD3Transformer2DModel):
        return model(draw(1, c.in_channels, 8, 8), text, pooled, time).sample
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))
    return model(
        draw(1, len(grid), c.in_channels),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time.to(text) / 1000,
        img_ids=grid.to(text),
        txt_ids=torch.zeros(TOKENS, 3).to(text),
        guidance=torch.full((1,), 3.5).to(text),
    ).sample


def linear_modules(model):
    """Name → module, of all that a LoRA can adapt."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# What files call a module of the pipeline. Names are compared with every dot as an underscore.

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
    models = _models(pipeline)
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
