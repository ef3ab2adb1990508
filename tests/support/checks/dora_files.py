"""DoRAs in files, read with the weights of their pipeline."""

import torch

from devec import Adapter
from support.adapters.doras import base
from support.pools.golden_pool import summed

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}


def read(path, kind="sd15", **options):
    return Adapter.from_pretrained(path, base=None if kind is None else base(kind), **options)


def weighted(*terms):
    """Σ weight · dense deltas."""
    return summed(*({m: w * d for m, d in truth.items()} for w, truth in terms))


QKV = "lora_unet_double_blocks_0_img_attn_qkv"

LINEAR1 = "lora_unet_single_blocks_1_linear1"

PROJ = "lora_unet_double_blocks_1_img_attn_proj"

SPLIT = "transformer.transformer_blocks.0.attn.to_"

FUSED = dict.fromkeys((QKV, LINEAR1, PROJ), "out")

UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_"
