"""A small vision transformer."""

import torch
from transformers import ViTConfig, ViTForImageClassification


def vit():
    """The model, the same each time."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()
