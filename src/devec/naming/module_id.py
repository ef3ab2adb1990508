"""Module ids: the model of a pipeline that a module belongs to, and its name in that model.

Two ids name the same module if they agree without their prefixes and with dots replaced by
underscores. This needs no table and never replaces underscores by dots, which would be ambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from devec.naming.families import flat

DENOISER = ""
CLIP_L, CLIP_G, T5 = "clip_l", "clip_g", "t5"
DENOISER_2 = "denoiser_2"  # as Wan 2.2 has one
DENOISERS = (DENOISER, DENOISER_2)

# Prefix → component. If one prefix begins with another, the longer one comes first.
_FLAT_PREFIXES = {
    "lora_unet__": DENOISER,
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_prior_unet_": DENOISER,
    "lycoris_": DENOISER,
    "lora_te_": CLIP_L,
    "lora_te1_": CLIP_L,
    "lora_te2_": CLIP_G,
    "lora_te3_": T5,
    "lora_prior_te_": CLIP_G,
}
_DOTTED_PREFIXES = {
    "transformer.base_model.model.": DENOISER,
    "unet.base_model.model.": DENOISER,
    "base_model.model.": DENOISER,
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    "transformer.": DENOISER,
    "transformer_2.": DENOISER_2,
    "unet.": DENOISER,
    "text_encoders.clip_l.transformer.": CLIP_L,
    "text_encoders.clip_g.transformer.": CLIP_G,
    "text_encoders.t5xxl.transformer.": T5,
    "text_encoder.": CLIP_L,
    "text_encoder_2.": CLIP_G,
    "text_encoder_3.": T5,
}


@dataclass(frozen=True)
class ModuleId:
    """A module id, split into its parts.

    Attributes:
        prefix: Prefix of the component, including its separator.
        component: The model of the pipeline: `DENOISER`, `CLIP_L`, …
        path: Name in that model, as written in the file.
        flat: Whether its dots are written as underscores.
    """

    prefix: str
    component: str
    path: str
    flat: bool

    @property
    def current_path(self) -> str:
        """The path as current versions of diffusers and transformers name it."""
        path = self.path
        if not self.flat and ".processor." in f".{path}" and not path.startswith(_XLABS):
            path = path.replace(".processor.", ".")
            path += ".0" if path.endswith(".to_out") else ""
        if self.component not in DENOISERS:
            head, _, last = path.rpartition("self_attn.to_")
            if head:
                path = f"{head}self_attn.{last.removesuffix('.0')}_proj"
        return path

    @property
    def key(self) -> tuple[str, str]:
        """Component and flat name, which are equal for all ids of one module."""
        return self.component, flat(self.bare_path)

    @property
    def bare_path(self) -> str:
        """The current path without the prefix that some versions of transformers add in CLIP."""
        if self.component in DENOISERS:
            return self.current_path
        return self.current_path.removeprefix("text_model_" if self.flat else "text_model.")


_XLABS = ("double_blocks.", "single_blocks.")


@lru_cache(maxsize=1 << 14)  # adapters of one pool have the same names
def parse_module_id(module: str) -> ModuleId:
    """Split a module id; without a known prefix it names a module of the denoiser."""
    for prefix, component in _FLAT_PREFIXES.items():
        if module.startswith(prefix) and "." not in module:
            path = module.removeprefix(prefix)
            return ModuleId(prefix, _text_encoder(component, path), path, flat=True)
    for prefix, component in _DOTTED_PREFIXES.items():
        if module.startswith(prefix):
            path = module.removeprefix(prefix)
            return ModuleId(prefix, _text_encoder(component, path), path, flat=False)
    component = CLIP_L if module.startswith("text_model.") else DENOISER
    return ModuleId(
        "", T5 if module.startswith("encoder.block.") else component, module, flat=False
    )


def _text_encoder(component: str, path: str) -> str:
    """The text encoder of a path: T5 is the second one in Flux and the third in SD3."""
    if component not in DENOISERS and flat(path).startswith(("encoder_block_", "shared")):
        return T5
    return component
