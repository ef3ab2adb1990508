"""Names of the modules of UNets: SD 1, SD 2, SDXL, by their authors and in diffusers."""

from __future__ import annotations

from functools import cache

from devec.naming.families import Family, NativeNames, native_family, prefixed_names

_MOST_TRANSFORMER_BLOCKS = 24

# Names inside a block: in Stability's generative-models ("sgm") → in diffusers.
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


_ATTENTION = {
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    **{
        f"transformer_blocks.{i}.{name}": f"transformer_blocks.{i}.{name}"
        for i in range(_MOST_TRANSFORMER_BLOCKS)
        for name in (
            *(f"attn{a}.to_{end}" for a in (1, 2) for end in ("q", "k", "v", "out.0")),
            "ff.net.0.proj",
            "ff.net.2",
        )
    },
}


_UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


def _unet() -> NativeNames:
    """The names of a UNet with two resnets in each block: SD 1, SD 2, SDXL."""
    # Input block 1 + 3b + l is layer l of down block b, and 3 + 3b is its downsampler. Output block
    # 3b + l is layer l of up block b, whose upsampler follows the last layer.
    native = prefixed_names(_UNET_ENDS)
    for n, middle in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        inner = _ATTENTION if n == 1 else _RESNET
        native |= prefixed_names(inner, f"middle_block.{n}.", f"mid_block.{middle}.")
    for b in range(4):
        for side, block, first, count in (
            ("input_blocks", "down_blocks", 1 + 3 * b, 2),
            ("output_blocks", "up_blocks", 3 * b, 3),
        ):
            for layer in range(count):
                at = f"{side}.{first + layer}"
                native |= prefixed_names(_RESNET, f"{at}.0.", f"{block}.{b}.resnets.{layer}.")
                native |= prefixed_names(_ATTENTION, f"{at}.1.", f"{block}.{b}.attentions.{layer}.")
        down, up = f"down_blocks.{b}.downsamplers.0.", f"up_blocks.{b}.upsamplers.0."
        native |= prefixed_names({"op": "conv"}, f"input_blocks.{3 + 3 * b}.0.", down)
        # after the attention if the block has one, otherwise directly after the resnet
        native |= prefixed_names({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.2.", up)
        native |= prefixed_names({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.1.", up)
    return native


@cache
def sdxl() -> Family:
    """Stable Diffusion XL, for which kohya's trainers use the authors' names."""
    return native_family("sdxl", _unet())


@cache
def sd() -> Family:
    """Stable Diffusion 1, for which kohya's trainers use the names of diffusers."""
    return native_family("sd", _unet(), kohya_native=False)


@cache
def sd2() -> Family:
    """Stable Diffusion 2: the names of version 1, with linear layers for its 1 × 1 convolutions."""
    return native_family("sd2", _unet(), kohya_native=False)
