"""Files that diffusers and PEFT write."""

import json
import tempfile
from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from support.golden_files.writing import (
    fill,
    golden,
    read,
)
from support.models.pipelines import make_pipeline


def adapted(model, name, **config):
    """A model with a random adapter by PEFT; returns its config."""
    config = LoraConfig(init_lora_weights=False, **config)
    model.add_adapter(config)
    fill(model, name)
    return config


def saved_by(pipeline, **layers):
    """What a pipeline's own `save_lora_weights` writes."""
    with tempfile.TemporaryDirectory() as directory:
        pipeline.save_lora_weights(directory, **layers)
        tensors, metadata = read(Path(directory) / "pytorch_lora_weights.safetensors")
    if found := metadata.get("lora_adapter_metadata"):
        config = json.loads(found)  # what is a set in PEFT comes in any order
        config = {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True)
    return tensors, metadata


def unet_layers(model):
    """The adapter of a UNet or its text encoder, as the training scripts of diffusers take it."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model))


ATTENTION = {
    "down": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up": "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
}


@golden
def diffusers_sd15():
    pipeline = make_pipeline("sd15")
    targets = [*ATTENTION.values(), "mid_block.resnets.1.conv2"]
    adapted(pipeline.unet, "unet", r=4, lora_alpha=4, target_modules=targets)
    adapted(pipeline.text_encoder, "te", r=2, lora_alpha=2, target_modules=["q_proj"])
    return saved_by(
        pipeline,
        unet_lora_layers=unet_layers(pipeline.unet),
        text_encoder_lora_layers=unet_layers(pipeline.text_encoder),
    )


@golden
def diffusers_sdxl():
    pipeline = make_pipeline("sdxl")
    layers = {}
    for name, targets in {
        "unet": list(ATTENTION.values()),
        "text_encoder": ["q_proj"],
        "text_encoder_2": ["out_proj"],
    }.items():
        model = getattr(pipeline, name)
        config = adapted(model, name, r=4, lora_alpha=3, target_modules=targets)
        layers[f"{name}_lora_layers"] = unet_layers(model)
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
    return saved_by(pipeline, **layers)


FLUX_TARGETS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.1.proj_out",
]


@golden
def diffusers_flux():
    """Ranks and alphas that differ, known only from the header."""
    pipeline = make_pipeline("flux")
    config = adapted(
        pipeline.transformer,
        "flux",
        r=4,
        lora_alpha=8,
        target_modules=FLUX_TARGETS,
        rank_pattern={"transformer_blocks.1.ff.net.2": 2},
        alpha_pattern={r"^single_transformer_blocks\.1\.proj_out": 3},
    )
    return saved_by(
        pipeline,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )


@golden
def diffusers_flux_bias():
    pipeline = make_pipeline("flux")
    fields = {"lora_bias": True, "target_modules": FLUX_TARGETS[:3]}
    adapted(pipeline.transformer, "bias", r=2, lora_alpha=2, **fields)
    return saved_by(
        pipeline, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer)
    )


@golden
def diffusers_sd3():
    pipeline = make_pipeline("sd3")
    targets = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.2.ff.net.0.proj",
    ]
    adapted(pipeline.transformer, "sd3", r=4, lora_alpha=4, target_modules=targets)
    adapted(pipeline.text_encoder, "te", r=2, lora_alpha=2, target_modules=["q_proj"])
    return saved_by(
        pipeline,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )


def saved_by_peft(**config):
    unet = make_pipeline("sd15").unet
    targets = [*ATTENTION.values(), "mid_block.resnets.1.conv2"]
    fields = {"r": 4, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(unet, LoraConfig(**fields, **config))
    fill(model, "peft")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return read(Path(directory) / "adapter_model.safetensors")


@golden
def peft():
    return saved_by_peft()


@golden
def peft_dora():
    return saved_by_peft(use_dora=True)


@golden
def peft_default():
    """The keys of a PEFT model's own `state_dict`, with the adapter's name in them."""
    tensors, metadata = saved_by_peft()
    renamed = {key.replace(".weight", ".default.weight"): v for key, v in tensors.items()}
    return {key: v.bfloat16() for key, v in renamed.items()}, metadata
