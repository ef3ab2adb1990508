"""How single-file adapters spell their keys: prefixes, dots or underscores, suffixes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from devec.naming.families import Family, flat
from devec.naming.module_id import (
    CLIP_G,
    CLIP_L,
    DENOISER,
    DENOISER_2,
    DENOISERS,
    T5,
    ModuleId,
    parse_module_id,
)

DORA_SCALE = ".dora_scale"
MAGNITUDE_VECTOR = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Naming:
    """How module ids are formed.

    Attributes:
        prefixes: Component → prefix of its module names.
        flat: Whether dots are written as underscores.
        scheme: ``"native"`` for the names of the model's authors, ``"xlabs"`` for those of XLabs'
            trainer, ``"diffusers"`` for all others.
        one_model: Whether a file has room for the adapter of one model only, as PEFT's files do.
        quirks: Deviations from current names: ``"processor"`` for attention layers of older
            diffusers, ``"no text_model"`` for CLIP in newer transformers, ``"several prefixes"`` if
            a component has more than one.
    """

    prefixes: Mapping[str, str]
    flat: bool
    scheme: str
    one_model: bool = False
    quirks: frozenset[str] = frozenset()

    def same_ids_as(self, other: Naming) -> bool:
        """Whether every module has the same id in both namings."""
        return self.same_style_as(other) and _SEVERAL not in self.quirks

    def same_style_as(self, other: Naming) -> bool:
        """Whether both namings agree, as far as one prefix for each component can tell."""
        common = self.prefixes.keys() & other.prefixes.keys()
        same = (self.flat, self.scheme, self.quirks) == (other.flat, other.scheme, other.quirks)
        return same and all(self.prefixes[c] == other.prefixes[c] for c in common)

    @property
    def is_comfy(self) -> bool:
        """Whether ComfyUI reads such files, with its keys ``dora_scale``, ``diff`` and others."""
        return self.flat or self.prefixes.get(DENOISER) in _COMFY

    def prefix(self, component: str, family: Family | None) -> str | None:
        """Prefix of a component's module names.

        Args:
            component: The component.
            family: Table of the base model's family.

        Returns:
            The prefix in the file or, if no module of the component is in the file, the prefix that
            readers of this convention expect; None if the file has no room for another model.
        """
        if component in self.prefixes:
            return self.prefixes[component]
        if self.one_model:
            return None
        if component == DENOISER_2 and (self.flat or self.prefixes.get(DENOISER) in _COMFY):
            return None
        if self.prefixes.get(DENOISER) in _COMFY:
            return f"text_encoders.{_COMFY_ENCODERS[component]}.transformer."
        named = kohya_naming if self.flat else diffusers_naming
        return named(family, [component]).prefixes[component]


# Prefixes of ComfyUI
_COMFY = ("diffusion_model.", "model.diffusion_model.")
_COMFY_ENCODERS = {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5xxl"}


@dataclass(frozen=True)
class Suffixes:
    """Key suffixes of the tensors of a module.

    Attributes:
        down: Suffix of the input-side factor A.
        up: Suffix of the output-side factor B.
        alpha: Suffix of alpha; empty for conventions without alpha, where scalings are folded.
        bias: Suffix of the bias change.
        magnitude: Suffix of the magnitudes of a DoRA.
    """

    down: str
    up: str
    alpha: str = ""
    bias: str = ".lora_B.bias"
    magnitude: str = f"{MAGNITUDE_VECTOR}.weight"

    def keys(self, module: str) -> tuple[str, str, str, str]:
        """Keys of down, up, alpha (empty without a suffix) and the bias of a module."""
        ends = (self.down, self.up)
        if re.search(r"_lora[12]$", module):  # XLabs numbers the streams of a block in the id
            ends = (".down.weight", ".up.weight")
        alpha = module + self.alpha if self.alpha else ""
        return module + ends[0], module + ends[1], alpha, module + self.bias


PEFT_KEYS = "PEFT keys"
DIFFUSERS, OLD_DIFFUSERS, KOHYA = "diffusers", "diffusers (up/down)", "kohya"


# ComfyUI reads the bias change unscaled; A1111 and kohya's tools read none.
WHOLE_BIAS = ".diff_b"
KOHYA_SUFFIXES = Suffixes(".lora_down.weight", ".lora_up.weight", ".alpha", WHOLE_BIAS, DORA_SCALE)
PEFT_SUFFIXES = Suffixes(".lora_A.weight", ".lora_B.weight")
XLABS_SUFFIXES = Suffixes("_lora.down.weight", "_lora.up.weight", magnitude=DORA_SCALE)


def naming_of(modules: Iterable[str], family: Family | None) -> Naming:
    """The naming of module ids; a component with several prefixes gets the most frequent one."""
    names = [parse_module_id(module) for module in modules]
    counts: dict[str, Counter[str]] = {}
    for name in names:
        counts.setdefault(name.component, Counter())[name.prefix] += 1
    native = (
        _flat_names(family.native) - _flat_names(family.diffusers_names) if family else frozenset()
    )
    scheme = "diffusers"
    if any(n.component in DENOISERS and n.key[1] in native for n in names):
        scheme = "xlabs" if any(".processor." in n.current_path for n in names) else "native"
    quirks = {quirk for quirk, has_quirk in _QUIRKS.items() if any(map(has_quirk, names))}
    if any(len(by_prefix) > 1 for by_prefix in counts.values()):
        quirks.add(_SEVERAL)
    return Naming(
        prefixes={
            component: by_prefix.most_common(1)[0][0] for component, by_prefix in counts.items()
        },
        flat=any(name.flat for name in names),
        scheme=scheme,
        one_model=any(name.prefix == "base_model.model." for name in names),
        quirks=frozenset(quirks),
    )


_SEVERAL = "several prefixes"
_QUIRKS: dict[str, Callable[[ModuleId], bool]] = {
    "processor": lambda name: name.current_path != name.path,
    "no text_model": lambda name: (
        name.component in (CLIP_L, CLIP_G) and not flat(name.path).startswith("text_")
    ),
}


def _flat_names(names: Iterable[str]) -> frozenset[str]:
    """The flat forms of dotted names."""
    return frozenset(flat(name) for name in names)


def convention_name(names: Iterable[ModuleId], down: str) -> str:
    """Name of a convention, after the programs that write it.

    Args:
        names: Module ids of a file.
        down: Suffix of an input-side factor, or of the tensor in its place.

    Returns:
        The name, for messages and reports.
    """
    names = list(names)
    prefixes = {name.prefix for name in names}
    for prefix, convention in _BY_PREFIX.items():
        if prefix in prefixes:
            return convention
    if prefixes & {"unet.", "transformer.", "text_encoder.", "text_encoder_2."}:
        return DIFFUSERS if down.startswith(".lora_A") else OLD_DIFFUSERS
    if any(".processor." in name.path for name in names):
        return "XLabs"
    return PEFT_KEYS if "base_model.model." in prefixes else "bare names"


_BY_PREFIX = {
    "lora_unet_": "kohya",
    "lora_unet__": "kohya",
    "lora_prior_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "diffusion_model.": "ai-toolkit / diffusion-pipe",
    "model.diffusion_model.": "ai-toolkit / diffusion-pipe",
    "lora_te_": "kohya",
    "lora_te1_": "kohya",
}


def kohya_naming(family: Family | None, components: Iterable[str]) -> Naming:
    """The naming of kohya's trainers for these components of a family."""
    single = family is not None and family.name in ("sd", "sd2")
    prefixes = {
        DENOISER: "lora_unet_",
        CLIP_L: "lora_te_" if single else "lora_te1_",
        CLIP_G: "lora_te2_",
        T5: "lora_te3_",
    }
    return Naming(
        {component: prefixes[component] for component in components},
        flat=True,
        scheme="native" if family is not None and family.kohya_native else "diffusers",
    )


def diffusers_naming(family: Family | None, components: Iterable[str]) -> Naming:
    """The naming of diffusers for these components of a family."""
    unet = family is not None and family.name in ("sd", "sd2", "sdxl")
    third = family is not None and family.name == "sd3"
    prefixes = {
        DENOISER: "unet." if unet else "transformer.",
        DENOISER_2: "transformer_2.",
        CLIP_L: "text_encoder.",
        CLIP_G: "text_encoder_2.",
        T5: "text_encoder_3." if third else "text_encoder_2.",
    }
    return Naming({c: prefixes[c] for c in components}, flat=False, scheme="diffusers")
