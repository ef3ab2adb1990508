"""Names of the modules of transformers for images and videos, by their authors and in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from devec.naming.families import MOST_BLOCKS, Family, NativeNames, native_family, prefixed_names

_FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}


_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


_XLABS_DOUBLE = {
    "processor.qkv_lora1": _FLUX_DOUBLE["img_attn.qkv"],
    "processor.qkv_lora2": _FLUX_DOUBLE["txt_attn.qkv"],
    "processor.proj_lora1": _FLUX_DOUBLE["img_attn.proj"],
    "processor.proj_lora2": _FLUX_DOUBLE["txt_attn.proj"],
}


_FINAL_SWAPPED = r"final_layer\.adaLN_modulation\.1"


@cache
def flux() -> Family:
    """FLUX.1: fused qkv, and in single blocks qkv fused with the first layer of the MLP."""
    double = {
        **_FLUX_DOUBLE,
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
    }
    single = {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp*4",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
    }
    xlabs_single = {
        "processor.qkv": "attn.to_q attn.to_k attn.to_v",
        "processor.proj": "proj_out",
    }
    native = prefixed_names(_FLUX_ENDS)
    for author, diffusers in (
        ("time_in", "timestep"),
        ("guidance_in", "guidance"),
        ("vector_in", "text"),
    ):
        embedder = f"time_text_embed.{diffusers}_embedder"
        native |= prefixed_names(
            {f"{author}.in_layer": "linear_1", f"{author}.out_layer": "linear_2"},
            diffusers=f"{embedder}.",
        )
    for i in range(MOST_BLOCKS):
        native |= prefixed_names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= prefixed_names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        native |= prefixed_names(_XLABS_DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= prefixed_names(
            xlabs_single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        )
    return native_family("flux", native, swapped=_FINAL_SWAPPED)


@cache
def flux2() -> Family:
    """FLUX.2: fused qkv in double blocks; single blocks are fused in diffusers as well."""
    double = {
        **_FLUX_DOUBLE,
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }
    single = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
    native = prefixed_names(_FLUX_ENDS)
    for stream in ("single_stream_modulation", "double_stream_modulation_img"):
        native |= prefixed_names({f"{stream}.lin": f"{stream}.linear"})
    native |= prefixed_names(
        {"double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear"}
    )
    for author, diffusers in (("time_in", "timestep"), ("guidance_in", "guidance")):
        native |= prefixed_names(
            {f"{author}.in_layer": "linear_1", f"{author}.out_layer": "linear_2"},
            diffusers=f"time_guidance_embed.{diffusers}_embedder.",
        )
    for i in range(MOST_BLOCKS):
        native |= prefixed_names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= prefixed_names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return native_family("flux2", native, swapped=_FINAL_SWAPPED)


@cache
def sd3() -> Family:
    """Stable Diffusion 3 and 3.5: joint blocks with fused qkv for image and text."""
    block = {
        "x_block.attn.qkv": _FLUX_DOUBLE["img_attn.qkv"],
        "context_block.attn.qkv": _FLUX_DOUBLE["txt_attn.qkv"],
        "x_block.attn.proj": "attn.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    }
    native = prefixed_names(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    )
    for i in range(MOST_BLOCKS):
        native |= prefixed_names(block, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    swapped = rf"{_FINAL_SWAPPED}|joint_blocks\.\d+\.context_block\.adaLN_modulation\.1"
    return native_family("sd3", native, swapped=swapped)


@cache
def wan() -> Family:
    """Wan 2.1 and 2.2: separate q, k and v, and in some models k and v of images."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    images = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
    native = prefixed_names(
        {
            "time_projection.1": "condition_embedder.time_proj",
            "head.head": "proj_out",
            "patch_embedding": "patch_embedding",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        }
    )
    for i in range(MOST_BLOCKS):
        native |= prefixed_names(attention, f"blocks.{i}.self_attn.", f"blocks.{i}.attn1.")
        native |= prefixed_names(
            {**attention, **images}, f"blocks.{i}.cross_attn.", f"blocks.{i}.attn2."
        )
        native |= prefixed_names(
            {"0": "net.0.proj", "2": "net.2"}, f"blocks.{i}.ffn.", f"blocks.{i}.ffn."
        )
    return native_family("wan", native)


@cache
def lumina2() -> Family:
    """Lumina 2: fused qkv with three times as many rows of queries as of keys and of values."""
    block = {
        "attention.qkv": "attn.to_q*3 attn.to_k attn.to_v",
        "attention.out": "attn.to_out.0",
        **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
        "adaLN_modulation.1": "norm1.linear",
    }
    ends = {
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
        "x_embedder": "x_embedder",
    }
    return native_family("lumina2", {**prefixed_names(ends), **_refiner_layers(block)})


@cache
def z_image() -> Family:
    """Z-Image: the layout of Lumina 2 with equal numbers of queries, keys and values."""
    block = {
        "attention.qkv": "attention.to_q attention.to_k attention.to_v",
        "attention.out": "attention.to_out.0",
        **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
        "adaLN_modulation.0": "adaLN_modulation.0",
    }
    ends = {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2")},
        **{name: name for name in ("cap_embedder.0", "cap_embedder.1")},
    }
    return native_family("z-image", {**prefixed_names(ends), **_refiner_layers(block)})


def _refiner_layers(block: Mapping[str, str]) -> NativeNames:
    """The names of a block in all layers and refiners of Lumina 2 and Z-Image."""
    native: NativeNames = {}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for i in range(MOST_BLOCKS):
            native |= prefixed_names(block, f"{stack}.{i}.", f"{stack}.{i}.")
    return native


@cache
def hunyuan_video() -> Family:
    """HunyuanVideo: the layout of FLUX.1 under other names."""
    double = {name.replace("attn.", "attn_"): parts for name, parts in _FLUX_DOUBLE.items()}
    for author, diffusers in (("img", ""), ("txt", "_context")):
        double |= {
            f"{author}_mlp.fc1": f"ff{diffusers}.net.0.proj",
            f"{author}_mlp.fc2": f"ff{diffusers}.net.2",
            f"{author}_mod.linear": f"norm1{diffusers}.linear",
        }
    single = {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp*4",
        "linear2": "proj_out",
        "modulation.linear": "norm.linear",
    }
    native = prefixed_names({"img_in.proj": "x_embedder.proj", "final_layer.linear": "proj_out"})
    for author, diffusers in (("time_in.mlp", "timestep"), ("guidance_in.mlp", "guidance")):
        ends = {f"{author}.0": "linear_1", f"{author}.2": "linear_2"}
        native |= prefixed_names(ends, diffusers=f"time_text_embed.{diffusers}_embedder.")
    ends = {"vector_in.in_layer": "linear_1", "vector_in.out_layer": "linear_2"}
    native |= prefixed_names(ends, diffusers="time_text_embed.text_embedder.")
    for i in range(MOST_BLOCKS):
        native |= prefixed_names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= prefixed_names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return native_family("hunyuan-video", native)


@cache
def qwen_image() -> Family:
    """Qwen-Image, whose names are the same everywhere."""
    layers = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
    layers += [f"attn.add_{name}_proj" for name in "qkv"]
    for stream in ("img", "txt"):
        layers += [f"{stream}_mod.1", f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2"]
    names = {"img_in", "txt_in", "proj_out", "norm_out.linear"}
    names |= {f"transformer_blocks.{i}.{name}" for i in range(MOST_BLOCKS) for name in layers}
    return Family("qwen-image", {}, frozenset(names), kohya_native=False)
