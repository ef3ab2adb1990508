"""Detection of the family of base models from an adapter's names, shapes and metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from devec.naming.families import Family
from devec.naming.module_id import CLIP_G, DENOISER, parse_module_id
from devec.naming.tables import TABLES

Shapes = Mapping[str, tuple[int, int]]


def _any_name(pattern: str) -> Callable[[Shapes], bool]:
    """A rule that holds if any flat name matches."""
    compiled = re.compile(pattern)
    return lambda shapes: any(compiled.search(name) for name in shapes)


def _any_ratio(pattern: str, numerator: int, denominator: int = 1) -> Callable[[Shapes], bool]:
    """A rule that holds if a weight whose flat name matches has this ratio of rows to columns."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.search(name) and m * denominator == n * numerator
        for name, (m, n) in shapes.items()
    )


def _any_columns(pattern: str, *columns: int) -> Callable[[Shapes], bool]:
    """A rule that holds if a weight whose flat name matches has one of these column counts."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.search(name) and n in columns for name, (_, n) in shapes.items()
    )


_UNET_NAMES = r"^(?:down|mid|up|input|middle|output)_blocks?_"

# The first of these rules that holds decides; metadata do not overrule it.
_CERTAIN_RULES: tuple[tuple[Callable[[Shapes], bool], str], ...] = (
    (_any_name(r"^joint_blocks_"), "sd3"),
    (_any_name(r"_img_mlp_fc\d|_img_mod_linear|_modulation_linear$"), "hunyuan-video"),
    (_any_ratio(r"^single_blocks_\d+_linear1", 9), "flux2"),
    (_any_name(r"to_qkv_mlp_proj|_ff_linear_in$|stream_modulation"), "flux2"),
    (_any_name(r"_(?:img|txt)_mod_lin$|_modulation_lin$|_(?:img|txt)_mlp_[02]$"), "flux"),
    (_any_ratio(r"attention_qkv$", 5, 3), "lumina2"),
    (_any_name(r"^layers_\d+_attn_to_[qkv]$"), "lumina2"),
    (
        _any_name(r"^(?:layers|noise_refiner|context_refiner)_\d+_(?:attention|feed_forward)_"),
        "z-image",
    ),
    (_any_name(r"^blocks_\d+_(?:self_attn|cross_attn|attn1|attn2|ffn)_"), "wan"),
    (_any_name(r"^transformer_blocks_\d+_(?:img|txt)_(?:mod|mlp)_"), "qwen-image"),
    (_any_name(r"^transformer_blocks_\d+_attn2_to_|^pos_embed_proj$"), "sd3"),
    (_any_columns(_UNET_NAMES + r".*attn2_to_[kv]$", 2048), "sdxl"),
    (_any_columns(_UNET_NAMES + r".*attn2_to_[kv]$", 1024), "sd2"),
    (_any_columns(_UNET_NAMES + r".*attn2_to_[kv]$", 768), "sd"),
    (_any_name(r"layers_\d+_(?:self_attn|mlp)_|^h_\d+_"), "language model"),
)


# Rules for adapters whose metadata name no family: other families have such names, too.
_LIKELY_RULES: tuple[tuple[Callable[[Shapes], bool], str], ...] = (
    (_any_name(r"^(?:double|single)_blocks_|^single_transformer_blocks_"), "flux"),
    (_any_columns(r"^transformer_blocks_\d+_attn_to_[qkv]$", 1536, 2432), "sd3"),
    (_any_name(_UNET_NAMES + r".*transformer_blocks_[1-9]|^label_emb_|^add_embedding_"), "sdxl"),
    (_any_name(r"^(?:input|output)_blocks_|^middle_block_"), "sdxl"),
    (_any_name(_UNET_NAMES), "sd"),
)


# Patterns of base models in metadata, for adapters on which no certain rule decides.
_METADATA_PATTERNS = (
    (r"stable-diffusion-xl|sdxl", "sdxl"),
    (r"stable-diffusion-?v?3|sd[-_]?3", "sd3"),
    (r"flux-?\.?2", "flux2"),
    (r"flux", "flux"),
    (r"stable-diffusion-v?2|sd_v2", "sd2"),
    (r"stable-diffusion-v?1|sd_v1", "sd"),
    (r"(?<![a-z])wan", "wan"),
    (r"lumina", "lumina2"),
    (r"z-?image", "z-image"),
    (r"qwen-?_?image", "qwen-image"),
    (r"hunyuan", "hunyuan-video"),
)


def detect_family_name(shapes: Shapes, hint: str = "", *, two_encoders: bool = False) -> str:
    """Name of the family of a base model.

    Args:
        shapes: Flat name of each module of the denoiser, without prefix → (out, in).
        hint: The base model according to metadata.
        two_encoders: Whether the adapter also changes a second CLIP text encoder, as in SDXL.

    Returns:
        The name; empty if the family cannot be detected.
    """
    certain = next((name for holds, name in _CERTAIN_RULES if holds(shapes)), "")
    if certain:
        return certain
    declared = next((n for words, n in _METADATA_PATTERNS if re.search(words, hint.lower())), "")
    likely = next((name for holds, name in _LIKELY_RULES if holds(shapes)), "")
    return declared or ("sdxl" if likely == "sd" and two_encoders else likely)


_KERNELS_3 = re.compile(
    r"resnets_\d+_conv[12]|(?:down|up)samplers_\d+_conv|conv_(?:in|out)|in_layers_2|out_layers_3"
    r"|input_blocks_\d+_0_op|output_blocks_\d+_\d_conv|input_blocks_0_0|out_2"
)


_KERNELS_1 = {
    "sd": re.compile(r"proj_(?:in|out)|conv_shortcut|skip_connection"),
    "sd2": re.compile(r"conv_shortcut|skip_connection"),
    "sdxl": re.compile(r"conv_shortcut|skip_connection"),
}


def conv_kernel(family: str, name: str, columns: int) -> tuple[int, ...]:
    """Kernel of a UNet's convolution by flat name and columns; empty for other modules."""
    if family not in _KERNELS_1:
        return ()
    if columns % 9 == 0 and re.search(rf"(?:{_KERNELS_3.pattern})$", name):
        return (3, 3)
    return (1, 1) if re.search(rf"(?:{_KERNELS_1[family].pattern})$", name) else ()


def detect_family(shapes: Mapping[str, tuple[int, int]], hint: str) -> tuple[str, Family | None]:
    """Name and table of the family of base models, by module ids and metadata."""
    names = {module: parse_module_id(module) for module in shapes}
    denoiser = {n.key[1]: shapes[m] for m, n in names.items() if n.component == DENOISER}
    two = any(n.component == CLIP_G for n in names.values())
    name = detect_family_name(denoiser, hint, two_encoders=two)
    table = TABLES.get(name)
    return name, table() if table else None
