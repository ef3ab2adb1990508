"""Tiny pipelines of diffusers with the structure of the real ones, and random weights."""

from contextlib import contextmanager

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


def make_pipeline(kind):
    """The pipeline of a kind ("sd15", "sdxl", "flux" or "sd3"), the same each time.

    Weights are drawn with variance 1/fan-in, so that every module has an effect one can see: at the
    initialisation of CLIP, attention would hardly change what comes out.
    """
    pipeline = PIPELINES[kind]()
    generator = torch.Generator().manual_seed(5)
    for model in models_of(pipeline).values():
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
    models = models_of(pipeline)
    generator = torch.Generator().manual_seed(11)
    name, denoiser = next(iter(models.items()))

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(next(denoiser.parameters()))

    outputs = {name: _denoise(denoiser, draw)}
    tokens = torch.arange(TOKENS)[None] + 3
    tokens[:, -1] = VOCABULARY - 1
    for name in models.keys() - outputs.keys():
        with _default_dtype(models[name].dtype):
            found = models[name](tokens)
        outputs[name] = found.last_hidden_state
        if getattr(found, "text_embeds", None) is not None:
            outputs[f"{name}.text_embeds"] = found.text_embeds
    return dict(sorted(outputs.items()))


@contextmanager
def _default_dtype(dtype):
    """With another default dtype of torch, in which transformers 4 builds masks of attention."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


def models_of(pipeline):
    """Name → denoiser and text encoders, the denoiser first."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    found = {n: getattr(pipeline, n, None) for n in (name, *ENCODERS)}
    return {n: model for n, model in found.items() if model is not None}


def linear_modules(model):
    """Name → module, of all that a LoRA can adapt."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
