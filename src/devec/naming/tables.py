"""The names of known base models, by their authors and in diffusers.

Reference: the conversion scripts of diffusers 0.42 and the models' own sources; the tests compare
these tables with what diffusers converts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from devec.naming.families import Family, Names, Segment, family, flat, names_below
from devec.naming.module_id import DENOISERS, Name

_MOST_BLOCKS = 100
_MOST_TRANSFORMER_BLOCKS = 24
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
    native = names_below(_FLUX_ENDS)
    for theirs, ours in (
        ("time_in", "timestep"),
        ("guidance_in", "guidance"),
        ("vector_in", "text"),
    ):
        embedder = f"time_text_embed.{ours}_embedder"
        native |= names_below(
            {f"{theirs}.in_layer": "linear_1", f"{theirs}.out_layer": "linear_2"},
            own=f"{embedder}.",
        )
    for i in range(_MOST_BLOCKS):
        native |= names_below(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= names_below(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        native |= names_below(_XLABS_DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= names_below(
            xlabs_single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        )
    return family("flux", native, swapped=_FINAL_SWAPPED)


@cache
def flux2() -> Family:
    """FLUX.2: fused qkv in double blocks; single blocks are fused in diffusers, too."""
    double = {
        **_FLUX_DOUBLE,
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }
    single = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
    native = names_below(_FLUX_ENDS)
    for stream in ("single_stream_modulation", "double_stream_modulation_img"):
        native |= names_below({f"{stream}.lin": f"{stream}.linear"})
    native |= names_below(
        {"double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear"}
    )
    for theirs, ours in (("time_in", "timestep"), ("guidance_in", "guidance")):
        native |= names_below(
            {f"{theirs}.in_layer": "linear_1", f"{theirs}.out_layer": "linear_2"},
            own=f"time_guidance_embed.{ours}_embedder.",
        )
    for i in range(_MOST_BLOCKS):
        native |= names_below(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= names_below(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return family("flux2", native, swapped=_FINAL_SWAPPED)


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
    native = names_below(
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
    for i in range(_MOST_BLOCKS):
        native |= names_below(block, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    swapped = rf"{_FINAL_SWAPPED}|joint_blocks\.\d+\.context_block\.adaLN_modulation\.1"
    return family("sd3", native, swapped=swapped)


@cache
def wan() -> Family:
    """Wan 2.1 and 2.2."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    images = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
    native = names_below(
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
    for i in range(_MOST_BLOCKS):
        native |= names_below(attention, f"blocks.{i}.self_attn.", f"blocks.{i}.attn1.")
        native |= names_below(
            {**attention, **images}, f"blocks.{i}.cross_attn.", f"blocks.{i}.attn2."
        )
        native |= names_below(
            {"0": "net.0.proj", "2": "net.2"}, f"blocks.{i}.ffn.", f"blocks.{i}.ffn."
        )
    return family("wan", native)


@cache
def lumina2() -> Family:
    """Lumina 2: fused qkv with fewer keys than queries, three to one to one."""
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
    return family("lumina2", {**names_below(ends), **_in_layers(block)})


@cache
def z_image() -> Family:
    """Z-Image: the layout of Lumina 2 with as many keys as queries."""
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
    return family("z-image", {**names_below(ends), **_in_layers(block)})


def _in_layers(block: Mapping[str, str]) -> Names:
    """The names of a block in the three stacks of Lumina 2 and Z-Image."""
    native: Names = {}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for i in range(_MOST_BLOCKS):
            native |= names_below(block, f"{stack}.{i}.", f"{stack}.{i}.")
    return native


@cache
def hunyuan_video() -> Family:
    """HunyuanVideo, laid out like FLUX.1 under names of its own."""
    double = {name.replace("attn.", "attn_"): parts for name, parts in _FLUX_DOUBLE.items()}
    for theirs, ours in (("img", ""), ("txt", "_context")):
        double |= {
            f"{theirs}_mlp.fc1": f"ff{ours}.net.0.proj",
            f"{theirs}_mlp.fc2": f"ff{ours}.net.2",
            f"{theirs}_mod.linear": f"norm1{ours}.linear",
        }
    single = {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp*4",
        "linear2": "proj_out",
        "modulation.linear": "norm.linear",
    }
    native = names_below({"img_in.proj": "x_embedder.proj", "final_layer.linear": "proj_out"})
    for theirs, ours in (("time_in.mlp", "timestep"), ("guidance_in.mlp", "guidance")):
        ends = {f"{theirs}.0": "linear_1", f"{theirs}.2": "linear_2"}
        native |= names_below(ends, own=f"time_text_embed.{ours}_embedder.")
    ends = {"vector_in.in_layer": "linear_1", "vector_in.out_layer": "linear_2"}
    native |= names_below(ends, own="time_text_embed.text_embedder.")
    for i in range(_MOST_BLOCKS):
        native |= names_below(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= names_below(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return family("hunyuan-video", native)


@cache
def qwen_image() -> Family:
    """Qwen-Image, whose names are the same everywhere."""
    layers = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
    layers += [f"attn.add_{name}_proj" for name in "qkv"]
    for stream in ("img", "txt"):
        layers += [f"{stream}_mod.1", f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2"]
    own = {"img_in", "txt_in", "proj_out", "norm_out.linear"}
    own |= {f"transformer_blocks.{i}.{name}" for i in range(_MOST_BLOCKS) for name in layers}
    return Family("qwen-image", {}, frozenset(own), native_files=False)


# Names in the model of Stability's generative-models ("sgm") → in diffusers, inside of a block.
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


def _unet() -> Names:
    """The names of a UNet of two resnets a block: SD 1, SD 2, SDXL.

    Input block 1 + 3b + l is layer l of down block b, 3 + 3b its downsampler; output block 3b + l
    is layer l of up block b, whose upsampler stands behind the last layer.

    Returns:
        Native name → parts.
    """
    native = names_below(_UNET_ENDS)
    for n, middle in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        inner = _ATTENTION if n == 1 else _RESNET
        native |= names_below(inner, f"middle_block.{n}.", f"mid_block.{middle}.")
    for b in range(4):
        for side, block, first, count in (
            ("input_blocks", "down_blocks", 1 + 3 * b, 2),
            ("output_blocks", "up_blocks", 3 * b, 3),
        ):
            for layer in range(count):
                at = f"{side}.{first + layer}"
                native |= names_below(_RESNET, f"{at}.0.", f"{block}.{b}.resnets.{layer}.")
                native |= names_below(_ATTENTION, f"{at}.1.", f"{block}.{b}.attentions.{layer}.")
        down, up = f"down_blocks.{b}.downsamplers.0.", f"up_blocks.{b}.upsamplers.0."
        native |= names_below({"op": "conv"}, f"input_blocks.{3 + 3 * b}.0.", down)
        # behind an attention in SDXL, straight behind a resnet where a block has none
        native |= names_below({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.2.", up)
        native |= names_below({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.1.", up)
    return native


@cache
def sdxl() -> Family:
    """Stable Diffusion XL, which kohya's trainers name after its original source."""
    return family("sdxl", _unet())


@cache
def sd() -> Family:
    """Stable Diffusion 1, which kohya's trainers name like diffusers."""
    return family("sd", _unet(), native_files=False)


@cache
def sd2() -> Family:
    """Stable Diffusion 2: the names of the first, linear layers for its 1 × 1 convolutions."""
    return family("sd2", _unet(), native_files=False)


@cache
def text_encoders() -> Family:
    """CLIP and T5, which have the same names everywhere."""
    clip = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    t5 = [f"layer.0.SelfAttention.{p}" for p in "qkvo"]
    t5 += [f"layer.1.DenseReluDense.{p}" for p in ("wi", "wi_0", "wi_1", "wo")]
    ends = ["embeddings.token_embedding", "embeddings.position_embedding"]
    own = {f"text_model.{name}" for name in ends} | {"text_projection", "shared"}
    for i in range(_MOST_BLOCKS):
        own |= {f"text_model.encoder.layers.{i}.{name}" for name in clip}
        own |= {f"encoder.block.{i}.{name}" for name in t5}
    return Family("text encoder", {}, frozenset(own), native_files=False)


TABLES: dict[str, Callable[[], Family]] = {
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "wan": wan,
    "lumina2": lumina2,
    "z-image": z_image,
    "hunyuan-video": hunyuan_video,
    "qwen-image": qwen_image,
    "sdxl": sdxl,
    "sd": sd,
    "sd2": sd2,
}


@cache
def dotted_names() -> Mapping[str, str]:
    """Flat name → dotted name in diffusers, for names that are the same in all known families."""
    found: dict[str, str] = {}
    for table in TABLES.values():
        for name in table().own:
            other = found.setdefault(flat(name), name)
            if other != name:
                found[flat(name)] = ""
    return {flat_name: name for flat_name, name in found.items() if name}


def parts_of(name: Name, shape: tuple[int, int], family: Family | None) -> tuple[Segment, ...]:
    """What a module is made of, by the tables of its component.

    Args:
        name: Its name.
        shape: Shape (out, in) of its weight.
        family: The tables of the base model's family.

    Returns:
        The parts.
    """
    component, flat_name = name.key
    if component in DENOISERS:
        return family.parts(flat_name, shape) if family else (Segment(flat_name),)
    parts = text_encoders().parts(f"text_model_{flat_name}", shape)
    if parts[0].name.startswith("text_model_"):  # not one of CLIP's
        parts = text_encoders().parts(flat_name, shape)
    return parts
