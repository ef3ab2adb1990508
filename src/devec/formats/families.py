"""How the modules of known base models are named by their authors and by diffusers.

A module of one naming may be several of the other: Flux' ``qkv`` is three layers in diffusers.
What neither naming splits further is a *part*, named after its module in diffusers. The tables list
every name outright, so that a name is looked up and never guessed; indices run further than any
model does.

Reference: the conversion scripts of diffusers 0.42 and the models' own sources; the tests compare
these tables with what diffusers converts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

Shapes = Mapping[str, tuple[int, int]]
Names = dict[str, "tuple[Part, ...]"]

_MOST_BLOCKS = 100
_MOST_TRANSFORMER_BLOCKS = 24


@dataclass(frozen=True)
class Part:
    """A piece of a module's rows.

    Attributes:
        name: Name in diffusers; with ``:scale`` or ``:shift`` for half a module.
        size: Relative number of rows within its module.
    """

    name: str
    size: int = 1


@dataclass(frozen=True)
class Family:
    """The names of a family of base models.

    Attributes:
        name: What the family is called.
        native: Dotted name by the model's authors → parts, in the order of the rows.
        own: Dotted names in diffusers.
        native_files: Whether kohya's trainers use the authors' names for it.
        swapped: Authors' names of modules of shape (2·n, n) whose halves diffusers swaps.
    """

    name: str
    native: Names
    own: frozenset[str]
    native_files: bool = True
    swapped: frozenset[str] = frozenset()

    def parts(self, name: str, shape: tuple[int, int]) -> tuple[Part, ...]:
        """What a module is made of.

        Args:
            name: Flat name of the module, by its authors or in diffusers.
            shape: Shape (out, in) of its weight.

        Returns:
            Its parts in the order of its rows; itself, if it is not known or not split.
        """
        module, native = self._by_flat_name.get(name, (name, False))
        parts = self.native[module] if native else (Part(module),)
        halved = parts[0].name in self._halved and shape[0] == 2 * shape[1]
        if not halved:
            return parts
        halves = (Part(f"{parts[0].name}:scale"), Part(f"{parts[0].name}:shift"))
        return halves[::-1] if native else halves

    def module(self, part: str, scheme: str) -> str:
        """The module that a part belongs to in a scheme of names.

        Args:
            part: Name of the part.
            scheme: ``"native"``, ``"xlabs"`` or ``"diffusers"``.

        Returns:
            The dotted name; empty if the scheme has none for it.
        """
        whole = part.partition(":")[0]
        if scheme == "diffusers":
            return whole if whole in self.own else ""
        return self._by_part[scheme].get(whole, "")

    @cached_property
    def _by_flat_name(self) -> dict[str, tuple[str, bool]]:
        """Flat name → dotted name, and whether it is one by the model's authors."""
        own = {flat(name): (name, False) for name in self.own}
        return own | {flat(name): (name, True) for name in self.native}

    @cached_property
    def _halved(self) -> frozenset[str]:
        """Names in diffusers of the modules whose halves are swapped."""
        return frozenset(self.native[name][0].name for name in self.swapped)

    @cached_property
    def _by_part(self) -> dict[str, dict[str, str]]:
        """Scheme → part → the authors' module it is in; the first where several hold it."""
        found: dict[str, dict[str, str]] = {"native": {}, "xlabs": {}}
        for module, parts in self.native.items():
            scheme = "xlabs" if ".processor." in module else "native"
            for part in parts:
                found[scheme].setdefault(part.name, module)
        return found


def flat(name: str) -> str:
    """A dotted name as kohya's trainers write it."""
    return name.replace(".", "_")


def _names(table: Mapping[str, str], native: str = "", own: str = "") -> Names:
    """Names below a block: ``"q k v"`` are parts, ``"mlp*4"`` is one of four times the rows."""
    result: Names = {}
    for name, parts in table.items():
        sized = (part.partition("*") for part in parts.split())
        result[native + name] = tuple(Part(own + part, int(size or 1)) for part, _, size in sized)
    return result


def _family(
    name: str, native: Names, *, native_files: bool = True, swapped: str = "(?!)"
) -> Family:
    """A family all of whose names have a native form."""
    own = frozenset(part.name for parts in native.values() for part in parts)
    halves = frozenset(n for n in native if re.fullmatch(swapped, n))
    return Family(name, native, own, native_files, halves)


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
    native = _names(_FLUX_ENDS)
    for theirs, ours in (
        ("time_in", "timestep"),
        ("guidance_in", "guidance"),
        ("vector_in", "text"),
    ):
        embedder = f"time_text_embed.{ours}_embedder"
        native |= _names(
            {f"{theirs}.in_layer": "linear_1", f"{theirs}.out_layer": "linear_2"},
            own=f"{embedder}.",
        )
    for i in range(_MOST_BLOCKS):
        native |= _names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= _names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        native |= _names(_XLABS_DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= _names(xlabs_single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return _family("flux", native, swapped=_FINAL_SWAPPED)


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
    native = _names(_FLUX_ENDS)
    for stream in ("single_stream_modulation", "double_stream_modulation_img"):
        native |= _names({f"{stream}.lin": f"{stream}.linear"})
    native |= _names({"double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear"})
    for theirs, ours in (("time_in", "timestep"), ("guidance_in", "guidance")):
        native |= _names(
            {f"{theirs}.in_layer": "linear_1", f"{theirs}.out_layer": "linear_2"},
            own=f"time_guidance_embed.{ours}_embedder.",
        )
    for i in range(_MOST_BLOCKS):
        native |= _names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= _names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return _family("flux2", native, swapped=_FINAL_SWAPPED)


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
    native = _names(
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
        native |= _names(block, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    swapped = rf"{_FINAL_SWAPPED}|joint_blocks\.\d+\.context_block\.adaLN_modulation\.1"
    return _family("sd3", native, swapped=swapped)


@cache
def wan() -> Family:
    """Wan 2.1 and 2.2."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    images = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
    native = _names(
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
        native |= _names(attention, f"blocks.{i}.self_attn.", f"blocks.{i}.attn1.")
        native |= _names({**attention, **images}, f"blocks.{i}.cross_attn.", f"blocks.{i}.attn2.")
        native |= _names({"0": "net.0.proj", "2": "net.2"}, f"blocks.{i}.ffn.", f"blocks.{i}.ffn.")
    return _family("wan", native)


@cache
def lumina2() -> Family:
    """Lumina 2: fused qkv with fewer keys than queries, three to one to one."""
    block = {
        "attention.qkv": "attn.to_q*3 attn.to_k attn.to_v",
        "attention.out": "attn.to_out.0",
        **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
        "adaLN_modulation.1": "norm1.linear",
    }
    return _family("lumina2", _in_layers(block))


@cache
def z_image() -> Family:
    """Z-Image: the layout of Lumina 2 with as many keys as queries."""
    block = {
        "attention.qkv": "attention.to_q attention.to_k attention.to_v",
        "attention.out": "attention.to_out.0",
        **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
        "adaLN_modulation.0": "adaLN_modulation.0",
    }
    return _family("z-image", _in_layers(block))


def _in_layers(block: Mapping[str, str]) -> Names:
    """The names of a block in the three stacks of Lumina 2 and Z-Image."""
    native: Names = {}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for i in range(_MOST_BLOCKS):
            native |= _names(block, f"{stack}.{i}.", f"{stack}.{i}.")
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
    native: Names = {}
    for i in range(_MOST_BLOCKS):
        native |= _names(double, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        native |= _names(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return _family("hunyuan-video", native)


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
    native = _names(_UNET_ENDS)
    for n, middle in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        inner = _ATTENTION if n == 1 else _RESNET
        native |= _names(inner, f"middle_block.{n}.", f"mid_block.{middle}.")
    for b in range(4):
        for side, block, first, count in (
            ("input_blocks", "down_blocks", 1 + 3 * b, 2),
            ("output_blocks", "up_blocks", 3 * b, 3),
        ):
            for layer in range(count):
                at = f"{side}.{first + layer}"
                native |= _names(_RESNET, f"{at}.0.", f"{block}.{b}.resnets.{layer}.")
                native |= _names(_ATTENTION, f"{at}.1.", f"{block}.{b}.attentions.{layer}.")
        down, up = f"down_blocks.{b}.downsamplers.0.", f"up_blocks.{b}.upsamplers.0."
        native |= _names({"op": "conv"}, f"input_blocks.{3 + 3 * b}.0.", down)
        # behind an attention in SDXL, straight behind a resnet where a block has none
        native |= _names({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.2.", up)
        native |= _names({"conv": "conv"}, f"output_blocks.{2 + 3 * b}.1.", up)
    return native


@cache
def sdxl() -> Family:
    """Stable Diffusion XL, which kohya's trainers name after its original source."""
    return _family("sdxl", _unet())


@cache
def sd() -> Family:
    """Stable Diffusion 1 and 2, which kohya's trainers name like diffusers."""
    return _family("sd", _unet(), native_files=False)


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


def _has(pattern: str) -> Callable[[Shapes], bool]:
    """Whether any flat name matches."""
    compiled = re.compile(pattern)
    return lambda shapes: any(compiled.search(name) for name in shapes)


def _ratio(pattern: str, numerator: int, denominator: int = 1) -> Callable[[Shapes], bool]:
    """Whether any weight whose flat name matches has this ratio of rows to columns."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.search(name) and m * denominator == n * numerator
        for name, (m, n) in shapes.items()
    )


def _columns(pattern: str, *columns: int) -> Callable[[Shapes], bool]:
    """Whether any weight whose flat name matches has one of these numbers of columns."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.search(name) and n in columns for name, (_, n) in shapes.items()
    )


_UNET_NAMES = r"^(?:down|mid|up|input|middle|output)_blocks?_"

# The first rule that holds decides; names come before sizes, which tiny models do not share.
_SIGNS: tuple[tuple[Callable[[Shapes], bool], str], ...] = (
    (_has(r"^joint_blocks_"), "sd3"),
    (_has(r"_img_mlp_fc\d|_img_mod_linear|_modulation_linear$"), "hunyuan-video"),
    (_ratio(r"^single_blocks_\d+_linear1", 9), "flux2"),
    (_has(r"to_qkv_mlp_proj|_ff_linear_in$|stream_modulation"), "flux2"),
    (_has(r"^(?:double|single)_blocks_|^single_transformer_blocks_"), "flux"),
    (_ratio(r"attention_qkv$", 5, 3), "lumina2"),
    (_has(r"^layers_\d+_attn_to_[qkv]$"), "lumina2"),
    (_has(r"^(?:layers|noise_refiner|context_refiner)_\d+_(?:attention|feed_forward)_"), "z-image"),
    (_has(r"^blocks_\d+_(?:self_attn|cross_attn|attn1|attn2|ffn)_"), "wan"),
    (_has(r"^transformer_blocks_\d+_(?:img|txt)_(?:mod|mlp)_"), "qwen-image"),
    (_columns(r"^transformer_blocks_\d+_attn_to_[qkv]$", 1536, 2432), "sd3"),
    (_has(r"^transformer_blocks_\d+_attn2_to_|^pos_embed_proj$"), "sd3"),
    (_columns(r"^transformer_blocks_\d+_attn_to_[qkv]$", 3072), "flux"),
    (_columns(_UNET_NAMES + r".*attn2_to_[kv]$", 2048), "sdxl"),
    (_columns(_UNET_NAMES + r".*attn2_to_[kv]$", 768, 1024), "sd"),
    (_has(_UNET_NAMES + r".*transformer_blocks_[1-9]|^label_emb_|^add_embedding_"), "sdxl"),
    (_has(r"^(?:input|output)_blocks_|^middle_block_"), "sdxl"),
    (_has(_UNET_NAMES), "sd"),
    (_has(r"layers_\d+_(?:self_attn|mlp)_|^h_\d+_"), "language model"),
)

# What metadata say of the base model, where names and sizes leave it open.
_HINTS = (
    (r"stable-diffusion-xl|sdxl", "sdxl"),
    (r"stable-diffusion-?v?3|sd[-_]?3", "sd3"),
    (r"flux-?\.?2", "flux2"),
    (r"flux", "flux"),
    (r"stable-diffusion-v?[12]|sd_v[12]|stable-diffusion-2", "sd"),
    (r"wan[-_]?2|\bwan", "wan"),
    (r"lumina", "lumina2"),
    (r"z-?image", "z-image"),
    (r"qwen-?_?image", "qwen-image"),
    (r"hunyuan", "hunyuan-video"),
)

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
}


def family_name(shapes: Shapes, hint: str = "", *, two_encoders: bool = False) -> str:
    """The family of a base model, from what is known of an adapter.

    Args:
        shapes: Flat name of each module of the denoiser, without prefix → (out, in).
        hint: What metadata say of the base model.
        two_encoders: Whether the adapter also changes a second CLIP text encoder, as SDXL has.

    Returns:
        The name, empty if nothing tells.
    """
    found = next((name for sign, name in _SIGNS if sign(shapes)), "")
    said = next((name for words, name in _HINTS if re.search(words, hint.lower())), "")
    if found == "sd" and (two_encoders or said == "sdxl"):
        return "sdxl"
    return found or said


_KERNELS_3 = re.compile(
    r"resnets_\d+_conv[12]|(?:down|up)samplers_\d+_conv|conv_(?:in|out)|in_layers_2|out_layers_3"
    r"|input_blocks_\d+_0_op|output_blocks_\d+_\d_conv|input_blocks_0_0|out_2"
)
_KERNELS_1 = {
    "sd": re.compile(r"proj_(?:in|out)|conv_shortcut|skip_connection"),
    "sdxl": re.compile(r"conv_shortcut|skip_connection"),
}


def conv_kernel(family: str, name: str, columns: int) -> tuple[int, ...]:
    """The kernel of a UNet's convolution whose stored factors are flattened.

    Args:
        family: The family of the base model.
        name: Flat name of the module.
        columns: Number of columns of the flattened weight.

    Returns:
        The kernel; empty for what is no convolution, or not known to be one.
    """
    if family not in _KERNELS_1:
        return ()
    if columns % 9 == 0 and re.search(rf"(?:{_KERNELS_3.pattern})$", name):
        return (3, 3)
    return (1, 1) if re.search(rf"(?:{_KERNELS_1[family].pattern})$", name) else ()


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
