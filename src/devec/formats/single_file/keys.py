"""Classifying the keys of single-file adapters, by name.

A key is the id of a module and a suffix. The id is opaque here: it is the key without the longest
known suffix.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from devec.errors import FormatError, UnsupportedError, listed

# Suffix → part: the three spellings of a pair of factors, and the tensors beside it.
_PARTS = {
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", "_lora.up.weight"), "up"),
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", "_lora.down.weight"), "down"),
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    **{f".lora_B{end}": "up" for end in ("", ".weight", ".default", ".default.weight")},
    **{f".lora_A{end}": "down" for end in ("", ".weight", ".default", ".default.weight")},
    ".lora_B.bias": "bias",
    ".lora_B.default.bias": "bias",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".scale": "scale",
    **{f".hada_{p}": f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{p}": f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".dora_scale": "dora_scale",
    ".magnitude": "magnitude",
    **{
        f".lora_magnitude_vector{end}": "magnitude"
        for end in ("", ".weight", ".default", ".default.weight")
    },
    **{f".{p}": p for p in ("diff", "diff_b", "w_norm", "b_norm")},
    **{f".{p}": p for p in ("set_weight", "reshape_weight")},
}
# XLabs numbers the streams of a block after the suffix; the number is part of the module's id.
_NUMBERED = r"(?<=_lora[12])\.(?P<numbered>up|down)\.weight"
_PART_KEY = re.compile(
    rf"(?P<id>.+?)(?:(?P<suffix>{'|'.join(map(re.escape, _PARTS))})|{_NUMBERED})", re.DOTALL
)

# Parts that change the model by something other than a low-rank product.
_CARRIED = frozenset(["diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"])
_CARRIED_PREFIXES = ("bundle_emb.",)

# Methods whose change depends on the base weights or on the state at the start of training.
_REFUSED = {
    "OFT": r"\.oft_(?:blocks|diag|R)(?:\.\w+)*",
    "BOFT": r"\.boft_(?:R|s)(?:\.\w+)*",
    "GLoRA": r"\.(?:a|b|bm)[12]\.weight",
    "IA3": r"\.ia3_l(?:\.\w+)*|\.on_input",
    "T-LoRA": r"\.lambda_layer(?:\.\w+)*",
    "VeRA": r"\.vera_lambda_[bd](?:\.\w+)*",
}
_REFUSED_KEY = re.compile(
    "|".join(rf"(?P<m{i}>.*(?:{suffix}))" for i, suffix in enumerate(_REFUSED.values())), re.DOTALL
)

_CHECKPOINT = re.compile(
    r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|model_ema|vae)\..*"
)
_EMBEDDING_KEYS = {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param"}
_SHOWN = 20


@dataclass(slots=True)
class ModuleKeys:
    """The keys of one module: part → key."""

    id: str
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class FileKeys:
    """All keys of a file, classified."""

    modules: dict[str, ModuleKeys] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sort_file_keys(shapes: Mapping[str, tuple[int, ...]]) -> FileKeys:
    """Classify every key of a file: as a part of a module, carried, or unknown.

    Args:
        shapes: Key → shape of its tensor.

    Returns:
        The keys.

    Raises:
        UnsupportedError: If a module belongs to a method without a delta of its own.
        FormatError: If two keys have the same meaning, or the file is no adapter.
    """
    result = FileKeys()
    for key in shapes:
        _sort_key(result, key)
    _refuse_other_methods(shapes)
    _move_scales_without_factors(result)
    if not _has_pair(result.modules.values()):
        if result.carried and not result.unknown:
            return result  # whole trained tensors alone
        raise FormatError(_no_adapter(shapes))
    _require_none_inside(result)
    return result


def _sort_key(keys: FileKeys, key: str) -> None:
    """Classify one key."""
    match = _PART_KEY.fullmatch(key)
    part = (_PARTS[match["suffix"]] if match["suffix"] else match["numbered"]) if match else ""
    if key.endswith((".lora_embedding_A", ".lora_embedding_B")):
        raise UnsupportedError(
            f"{key!r} is a LoRA of an embedding, which only PEFT directories can store; read it "
            "with its adapter_config.json"
        )
    if key.startswith(_CARRIED_PREFIXES) or part in _CARRIED:
        keys.carried.append(key)
    elif match is None:
        keys.unknown.append(key)
    else:
        id = sys.intern(match["id"])  # adapters of a pool share their ids
        module = keys.modules.setdefault(id, ModuleKeys(id))
        if part in module.parts:
            raise FormatError(
                f"two tensors for the same part of module {match['id']!r}: "
                f"{module.parts[part]!r} and {key!r}"
            )
        module.parts[part] = key


def _move_scales_without_factors(keys: FileKeys) -> None:
    """Move alphas without factors, which scale nothing, to the carried or the unknown keys."""
    carried = {match["id"] for key in keys.carried if (match := _PART_KEY.fullmatch(key))}
    for module in list(keys.modules.values()):
        if module.parts.keys() <= {"alpha", "scale"}:
            del keys.modules[module.id]
            others = keys.carried if module.id in carried else keys.unknown
            others.extend(module.parts.values())


def _has_pair(modules: Iterable[ModuleKeys]) -> bool:
    """Whether any module has factors."""
    kinds = ("up", "down", "hada_", "lokr_")
    return any(part.startswith(kinds) for module in modules for part in module.parts)


def _refuse_other_methods(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse methods that are no sums of low-rank products, by name."""
    for key, shape in shapes.items():
        match = _REFUSED_KEY.fullmatch(key)
        if match is None or match.lastgroup is None:
            continue
        method = list(_REFUSED)[int(match.lastgroup[1:])]
        if method == "OFT" and len(shape) == 4:  # LyCORIS stores BOFT under the same keys
            method = "BOFT"
        raise UnsupportedError(
            f"this is an adapter of the kind {method} ({key!r}): what it changes depends on the "
            "base weights or on how training began, so it has no delta that could be computed "
            "with; extract a LoRA of the merged model instead"
        )


def _require_none_inside(keys: FileKeys) -> None:
    """Refuse unknown keys of adapted modules: they may affect the delta."""
    inside = [key for key in keys.unknown if _is_inside(key, keys.modules)]
    if inside:
        raise UnsupportedError(
            f"{len(inside)} keys belong to adapted modules, and what they mean is not known: "
            f"{listed(inside, _SHOWN)}"
        )


def _is_inside(key: str, modules: Mapping[str, ModuleKeys]) -> bool:
    """Whether a key continues the id of a module."""
    stem = key
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in modules:
            return True
    return False


def _no_adapter(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The message for a file without an adapted module."""
    names = list(shapes)
    weights = sum(key.endswith((".weight", ".bias", ".scale", ".modulation")) for key in names)
    if any(_CHECKPOINT.fullmatch(key) for key in names) or weights > len(names) / 2 > 0.5:
        what = "this is a full checkpoint or another set of weights, not an adapter"
    elif all(key.partition(".")[0] in _EMBEDDING_KEYS or key.startswith("<") for key in names):
        what = "this is an embedding (textual inversion), not an adapter; it cannot be decomposed"
    else:
        what = "none of the keys is one of a LoRA, LoHa or LoKr adapter"
    return f"{what}. Keys: {listed(names, _SHOWN)}"
