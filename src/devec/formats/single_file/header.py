"""The strings in the header of a file: reading them, and those of an output.

`ss_*` are kohya's, read by A1111 and Forge; `sshs_*` are hashes; `modelspec.*` is Stability's
ModelSpec; `lora_adapter_metadata` is diffusers', which takes ranks and alphas from it.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from devec._version import __version__
from devec.errors import FormatError
from devec.files.json_text import json_object, require_pattern
from devec.formats.record import RECORD_KEY, parse_record

ADAPTER_KEY = "lora_adapter_metadata"

# Strings that hold for every part of an adapter: about its base model, its author and licence.
_OF_THE_BASE = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "base_model_name_or_path",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.license",
    "modelspec.author",
)
_NEVER_KEPT = ("sshs_legacy_hash", "ss_network_dim", "ss_network_alpha", ADAPTER_KEY, RECORD_KEY)
_SINGLE_SOURCE = ("compress", "convert", "combine", "as_lora")


def base_hint(metadata: Mapping[str, str]) -> str:
    """The strings of a header that tell the family of the base model."""
    keys = (
        "base_model_name_or_path",
        "ss_base_model_version",
        "modelspec.architecture",
        "ss_network_module",
    )
    return " ".join(metadata[key] for key in keys if metadata.get(key))


def record_in_header(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The provenance record in a header; None if there is none."""
    if RECORD_KEY not in metadata:
        return None
    return parse_record(metadata[RECORD_KEY], f"{RECORD_KEY!r} in the header")


def adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Diffusers' ranks and alphas, ``{"unet.r": …, "unet.rank_pattern": {…}}``; empty if none."""
    if ADAPTER_KEY not in metadata:
        return {}
    config = json_object(metadata[ADAPTER_KEY], f"{ADAPTER_KEY!r} in the header")
    for key, value in config.items():
        field = key.rpartition(".")[2]
        if field == "r":
            _require_positive(key, value)
        elif field == "lora_alpha":
            _require_number(key, value)
        elif field in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value, dict | None):
                raise FormatError(f"{ADAPTER_KEY}: {key} should be an object, is {value!r}")
            check = _require_positive if field == "rank_pattern" else _require_number
            for name, number in (value or {}).items():
                require_pattern(name, f"a key of {key} in {ADAPTER_KEY}")
                check(f"{key}[{name!r}]", number)
    return config


def _require_positive(key: str, value: Any) -> None:  # noqa: ANN401
    """Check that a rank is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{ADAPTER_KEY}: {key} should be a positive integer, is {value!r}")


def _require_number(key: str, value: Any) -> None:  # noqa: ANN401
    """Check that a rank or alpha is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise FormatError(f"{ADAPTER_KEY}: {key} should be a finite number, is {value!r}")


def header_unchanged(metadata: Mapping[str, str], digest: str) -> dict[str, str]:
    """The header of an adapter that is written unchanged, with the hashes of the output."""
    kept = {k: v for k, v in metadata.items() if k not in ("sshs_legacy_hash", ADAPTER_KEY)}
    return {**kept, "format": "pt", **_hashes(metadata, digest)}


def header_of_result(
    metadata: Mapping[str, str],
    name: str,
    record: Mapping[str, Any] | None,
    ranks: Sequence[int],
    alphas: Sequence[float],
    digest: str,
) -> dict[str, str]:
    """The header of the result of an operation.

    Strings about training are kept if the result derives from one adapter (its unique part, or the
    adapter alone scaled, compressed or converted), and dropped for shared and combined results.

    Args:
        metadata: The strings of the header of the adapter that gave the layout.
        name: Name of the result.
        record: The record of the operation.
        ranks: Rank of every module written.
        alphas: Alpha of every module written.
        digest: SHA-256 of the data.

    Returns:
        The strings.
    """
    record = record or {}
    inputs = [str(i.get("name")) for i in record.get("inputs", [])]
    single = record.get("operation") in _SINGLE_SOURCE and len(inputs) == 1
    trained = single or record.get("part") == "unique"
    kept = {k: v for k, v in metadata.items() if (trained or k in _OF_THE_BASE)}
    kept = {k: v for k, v in kept.items() if k not in _NEVER_KEPT}
    if record.get("part") != "unique":
        kept.pop("ss_network_args", None)  # it may contain ranks of convolutions
    if any(key.startswith("ss_") for key in metadata):
        kept["ss_output_name"] = name
    if any(key.startswith("modelspec.") for key in metadata):
        now = datetime.datetime.now(datetime.timezone.utc)
        kept["modelspec.title"] = name
        kept["modelspec.date"] = now.isoformat(timespec="seconds")
        kept["modelspec.merged_from"] = ", ".join(inputs)
    if "name" in kept:
        kept["name"] = name
    if record:
        stamped = {"devec_version": __version__, **record}
        kept[RECORD_KEY] = json.dumps(stamped, ensure_ascii=False, sort_keys=True)
    return _settled(kept, metadata, ranks, alphas, digest)


def _settled(
    kept: dict[str, str],
    read: Mapping[str, str],
    ranks: Sequence[int],
    alphas: Sequence[float],
    digest: str,
) -> dict[str, str]:
    """The strings, with kohya's ranks and alphas and the hashes of the tensors written."""
    kept["format"] = "pt"
    if any(key.startswith("ss_") for key in read):
        module = read.get("ss_network_module", "")
        plain = module.startswith("networks.lora")
        kept["ss_network_module"] = module if plain else "networks.lora"
        if not plain:
            kept.pop("ss_network_args", None)  # arguments of LoHa or LoKr, now rewritten
        kept["ss_network_dim"] = _one_or_dynamic(ranks)
        kept["ss_network_alpha"] = _one_or_dynamic(alphas)
    return {**kept, **_hashes(read, digest)}


def _hashes(read: Mapping[str, str], digest: str) -> dict[str, str]:
    """The hashes of the data written, for those that the input's header has."""
    values = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return {key: value for key, value in values.items() if key in read}


def _one_or_dynamic(values: Sequence[float]) -> str:
    """The value if all agree, else ``"Dynamic"`` as in kohya's tools."""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"
