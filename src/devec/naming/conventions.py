"""How a single-file adapter spells what it holds: prefixes, dots or underscores, suffixes."""

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
    """How module ids are made.

    Attributes:
        prefixes: Component → what stands before its modules' names.
        flat: Whether dots are written as underscores.
        scheme: ``"native"`` where the model's authors' names are used, ``"xlabs"`` where those of
            XLabs' trainer, and ``"diffusers"`` where it is neither, or all names are the same.
        one_model: Whether there is room for the adapter of one model only, as in PEFT's files.
        quirks: In what the names differ from those of today: ``"processor"`` for attention layers
            of older diffusers, ``"no text_model"`` for CLIP as newer transformers name it,
            ``"several prefixes"`` where a component has more than one.
    """

    prefixes: Mapping[str, str]
    flat: bool
    scheme: str
    one_model: bool = False
    quirks: frozenset[str] = frozenset()

    def same_ids_as(self, other: Naming) -> bool:
        """Whether the same module has the same id in both."""
        return self.same_style_as(other) and _SEVERAL not in self.quirks

    def same_style_as(self, other: Naming) -> bool:
        """Whether ids are made in the same way, as far as one prefix a component says it."""
        common = self.prefixes.keys() & other.prefixes.keys()
        ways = (self.flat, self.scheme, self.quirks) == (other.flat, other.scheme, other.quirks)
        return ways and all(self.prefixes[c] == other.prefixes[c] for c in common)

    @property
    def is_comfy(self) -> bool:
        """Whether it is read as ComfyUI reads: with ``dora_scale``, ``diff`` and the like."""
        return self.flat or self.prefixes.get(DENOISER) in _COMFY

    def prefix(self, component: str, family: Family | None) -> str | None:
        """What stands before the names of a component's modules.

        Args:
            component: The component.
            family: The tables of the base model's family.

        Returns:
            The prefix, where no module has one yet that of the programs that read the convention;
            None if there is no room for another model.
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


# ComfyUI's own names
_COMFY = ("diffusion_model.", "model.diffusion_model.")
_COMFY_ENCODERS = {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5xxl"}


@dataclass(frozen=True)
class Suffixes:
    """How the tensors of a module are called.

    Attributes:
        down: Suffix of the factor on the input side.
        up: Suffix of the factor on the output side.
        alpha: Suffix of alpha; empty where there is none, so that scalings are folded.
        bias: Suffix of the change of the bias.
        magnitude: Suffix of the magnitudes of a DoRA.
    """

    down: str
    up: str
    alpha: str = ""
    bias: str = ".lora_B.bias"
    magnitude: str = f"{MAGNITUDE_VECTOR}.weight"

    def keys(self, module: str) -> tuple[str, str, str, str]:
        """Keys of down, up, alpha (empty if there is none) and the bias of a module."""
        ends = (self.down, self.up)
        if re.search(r"_lora[12]$", module):  # XLabs numbers the streams of a block in the id
            ends = (".down.weight", ".up.weight")
        alpha = module + self.alpha if self.alpha else ""
        return module + ends[0], module + ends[1], alpha, module + self.bias


PEFT_KEYS = "PEFT keys"
DIFFUSERS, OLD_DIFFUSERS, KOHYA = "diffusers", "diffusers (up/down)", "kohya"


# ComfyUI reads the change of a bias as a whole, unscaled; A1111 and kohya's own tools read none.
WHOLE_BIAS = ".diff_b"
KOHYA_SUFFIXES = Suffixes(".lora_down.weight", ".lora_up.weight", ".alpha", WHOLE_BIAS, DORA_SCALE)
PEFT_SUFFIXES = Suffixes(".lora_A.weight", ".lora_B.weight")
XLABS_SUFFIXES = Suffixes("_lora.down.weight", "_lora.up.weight", magnitude=DORA_SCALE)


def naming_of(modules: Iterable[str], family: Family | None) -> Naming:
    """How the modules of a file are named.

    Args:
        modules: Their ids.
        family: The tables of the base model's family, if there are any.

    Returns:
        The naming; for a component with several prefixes the most frequent one.
    """
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
    quirks = {quirk for quirk, has in _QUIRKS.items() if any(map(has, names))}
    if any(len(found) > 1 for found in counts.values()):
        quirks.add(_SEVERAL)
    return Naming(
        prefixes={component: found.most_common(1)[0][0] for component, found in counts.items()},
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
    return frozenset(flat(name) for name in names)


def convention_name(names: Iterable[ModuleId], down: str) -> str:
    """What a convention is called, after the programs that write it.

    Args:
        names: The names of a file's modules.
        down: Suffix of a factor on the input side, or of what stands in its place.

    Returns:
        A short description.
    """
    names = list(names)
    prefixes = {name.prefix for name in names}
    for prefix, description in _BY_PREFIX.items():
        if prefix in prefixes:
            return description
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
    """How kohya's trainers name the modules of a family.

    Args:
        family: The tables of the family, if there are any.
        components: The components the adapter has.

    Returns:
        The naming.
    """
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
    """How diffusers names the modules of a family.

    Args:
        family: The tables of the family, if there are any.
        components: The components the adapter has.

    Returns:
        The naming.
    """
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
