"""The tables of all known families of base models, and lookups across them.

Reference: the conversion scripts of diffusers 0.42 and the models' own sources; the tests compare
the tables with the result of diffusers' conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from devec.naming.families import MOST_BLOCKS, Family, Segment, flat
from devec.naming.module_id import DENOISERS, ModuleId
from devec.naming.transformer_tables import (
    flux,
    flux2,
    hunyuan_video,
    lumina2,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from devec.naming.unet_tables import sd, sd2, sdxl


@cache
def text_encoders() -> Family:
    """CLIP and T5, whose names are the same everywhere."""
    clip = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    t5 = [f"layer.0.SelfAttention.{p}" for p in "qkvo"]
    t5 += [f"layer.1.DenseReluDense.{p}" for p in ("wi", "wi_0", "wi_1", "wo")]
    ends = ["embeddings.token_embedding", "embeddings.position_embedding"]
    names = {f"text_model.{name}" for name in ends} | {"text_projection", "shared"}
    for i in range(MOST_BLOCKS):
        names |= {f"text_model.encoder.layers.{i}.{name}" for name in clip}
        names |= {f"encoder.block.{i}.{name}" for name in t5}
    return Family("text encoder", {}, frozenset(names), kohya_native=False)


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
    """Flat name → dotted name in diffusers, if all known families agree on it."""
    dotted: dict[str, str] = {}
    for table in TABLES.values():
        for name in table().diffusers_names:
            other = dotted.setdefault(flat(name), name)
            if other != name:
                dotted[flat(name)] = ""
    return {flat_name: name for flat_name, name in dotted.items() if name}


def segments_of(
    name: ModuleId, shape: tuple[int, int], family: Family | None
) -> tuple[Segment, ...]:
    """Segments of a module of shape (out, in), by the table of its component."""
    component, flat_name = name.key
    if component in DENOISERS:
        return family.segments(flat_name, shape) if family else (Segment(flat_name),)
    segments = text_encoders().segments(f"text_model_{flat_name}", shape)
    if segments[0].name.startswith("text_model_"):  # not a module of CLIP
        segments = text_encoders().segments(flat_name, shape)
    return segments
