"""Reading and checking PEFT's ``adapter_config.json``.

As in PEFT, the first pattern of ``rank_pattern`` that matches a module's name, in the order of the
file, decides its rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devec.base_model.live import is_plain_init
from devec.errors import FormatError, UnsupportedError, listed, warn
from devec.files.json_text import json_object, require_pattern
from devec.formats.rank_patterns import Config

CONFIG_NAME = "adapter_config.json"


_KEEP_BASE = (
    "save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
    "which turns it into a plain LoRA of the unchanged base model"
)


_CONVERT = "PEFT's convert_to_lora can approximate it by a plain LoRA"


# Fields of adapters that are no sum of B·A: what they are, and the remedy.
_REFUSED_FIELDS = {
    "kasa_config": ("is a KaSA adapter: it truncates the base weight", _CONVERT),
    "use_bdlora": ("is a BD-LoRA adapter: its factors are stacked blocks", _CONVERT),
    "arrow_config": (
        "is an Arrow router: its effect depends on the input",
        "the adapters it routes between are ordinary LoRAs, use those",
    ),
}


# Fields that PEFT refuses beside use_dora: no host would load the adapter.
_NEVER_DORA = (
    "lora_bias",
    "target_parameters",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)


# State of training methods that does not affect the forward pass after training.
TRAINING_ONLY_FIELDS = ("velora_config", "monteclora_config", "eva_config")


TRAINING_ONLY_TENSORS = (".lora_velora_embed", ".lora_monteclora_sampler")


# All fields of PEFT 0.21.2. A later one may change what an adapter does.
_KNOWN_FIELDS = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ]
)


# Fields about whole trained tensors, with PEFT's defaults.
CARRIED_FIELDS: Config = {
    "modules_to_save": None,
    "trainable_token_indices": None,
    "bias": "none",
    "ensure_weight_tying": False,
}


# Tasks for which PEFT's own classes train a whole head and refuse adapters without one.
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


# Fields that all adapters of a pool must agree in: they affect which layers are changed, and how.
POOL_FIELDS = ("alora_invocation_tokens", "layer_replication", "use_qalora", "qalora_group_size")


def read_config(directory: Path) -> Config:
    """Read and check the configuration of a PEFT adapter.

    Args:
        directory: The adapter directory.

    Returns:
        The configuration, in the order of the file.

    Raises:
        FormatError: If it is not a valid LoRA configuration.
        UnsupportedError: If it describes something other than a plain low-rank delta.
    """
    path = directory / CONFIG_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} is not readable: {error}") from error
    config = json_object(text, str(path))
    require_lora(config, str(path))
    return config


def require_lora(config: Config, where: str) -> None:
    """Check a configuration, from a file or of a loaded adapter.

    Args:
        config: The configuration.
        where: Its origin, for messages.

    Raises:
        FormatError: If it is not a valid LoRA configuration.
        UnsupportedError: If it describes something other than a plain low-rank delta.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{where}: peft_type is {kind!r}, expected 'LORA'; of some other methods PEFT's "
            "convert_to_lora makes a plain LoRA"
        )
    _require_types(config, where)
    _require_plain(config, where)
    _require_numbers(config, where)
    unknown = [field for field, value in config.items() if value and field not in _KNOWN_FIELDS]
    if unknown:
        warn(
            f"{where}: the fields {listed(unknown)} are not known; they are kept, and assumed not "
            "to change what the adapter does"
        )


def _require_types(config: Config, where: str) -> None:
    """Check the types of the fields that are read."""
    for field in ("use_rslora", "lora_bias", "use_dora"):
        if not isinstance(config.get(field, False), bool | None):
            raise FormatError(f"{where}: {field} should be true or false, is {config[field]!r}")
    for field in ("target_modules", "target_parameters"):
        value = config.get(field)
        if isinstance(value, str) and field == "target_modules":
            require_pattern(value, f"{where}: {field}")
        elif not (value is None or _is_list_of_names(value)):
            raise FormatError(f"{where}: {field} should be a list of names, is {value!r}")


def _is_list_of_names(value: Any) -> bool:  # noqa: ANN401
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _require_plain(config: Config, where: str) -> None:
    """Refuse adapters that are no plain low-rank delta, by the name of the method."""
    for field, (what, remedy) in _REFUSED_FIELDS.items():
        if config.get(field):
            raise UnsupportedError(f"{where}: the adapter {what} ({field}); {remedy}")
    if config.get("use_dora"):
        require_dora_fits(config, where)
    init = str(config.get("init_lora_weights", True)).lower()
    if not is_plain_init(init):
        remedy = _KEEP_BASE if init.startswith(("pissa", "olora", "corda", "lora_ga")) else _CONVERT
        raise UnsupportedError(
            f"{where}: init_lora_weights={config['init_lora_weights']!r} changes the base weights "
            f"when the adapter is loaded, so B·A is not the change the adapter makes; {remedy}"
        )


def require_dora_fits(config: Config, where: str) -> None:
    """Refuse the configuration of a DoRA with fields that PEFT does not support beside it."""
    beside = [field for field in _NEVER_DORA if config.get(field)]
    if beside:
        raise UnsupportedError(
            f"{where}: {listed(beside)} beside use_dora is nothing that PEFT loads; one of them is "
            "wrong"
        )
    if config.get("layer_replication"):
        raise UnsupportedError(
            f"{where}: layer_replication beside use_dora is not supported, as the copied layers "
            "have names that the base model does not have; " + _CONVERT
        )


def _require_numbers(config: Config, where: str) -> None:
    """Check ranks, alphas and patterns."""
    ranks = {"r": config.get("r"), **_pattern(config, "rank_pattern", where)}
    alphas = {"lora_alpha": config.get("lora_alpha"), **_pattern(config, "alpha_pattern", where)}
    for field, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise FormatError(f"{where}: rank {field!r} should be a positive integer, is {rank!r}")
    for field, alpha in alphas.items():
        if (
            not isinstance(alpha, int | float)
            or isinstance(alpha, bool)
            or not math.isfinite(alpha)
        ):
            raise FormatError(f"{where}: alpha {field!r} should be a finite number, is {alpha!r}")


def _pattern(config: Config, field: str, where: str) -> dict[str, Any]:
    """A rank or alpha pattern; refused unless it maps regular expressions to values."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise FormatError(f"{where}: {field} should be an object, is {pattern!r}")
    for key in pattern:
        require_pattern(key, f"{where}: a key of {field}")
    return pattern


def targets(config: Config, name: str) -> bool:
    """Whether ``target_modules`` names a module; True if the configuration does not tell."""
    # as in PEFT, a list is matched against endings of the name, a string is a pattern
    wanted = config.get("target_modules")
    if not wanted:
        return wanted is None or not config.get("target_parameters")
    if config.get("ensure_weight_tying") or str(wanted).lower() == "all-linear":
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def is_saved_whole(config: Config, name: str) -> bool:
    """Whether a module is in ``modules_to_save`` or inside such a module: PEFT adapts neither."""
    saved = config.get("modules_to_save") or []
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in saved)


def experts_input_side(config: Config) -> str:
    """The axis of a stacked parameter that A acts on, ``"first"`` or ``"second"``."""
    # PEFT changed it in version 0.19, under the same keys; versions before 0.18 are not recorded
    numbers = re.findall(r"\d+", str(config.get("peft_version") or "0"))
    return "second" if [int(n) for n in numbers[:2]] >= [0, 19] else "first"


def require_agreement(field: str, values: Sequence[Any]) -> None:
    """Refuse adapters that differ in a field."""
    if any((value or None) != (values[0] or None) for value in values):
        raise UnsupportedError(
            f"the adapters differ in {field} ({listed([str(v) for v in values])}), so no single "
            "adapter does what they do together"
        )


def require_same_parameters(configs: Sequence[Config]) -> None:
    """Refuse adapters that target different parameters: equal keys would mean different ones."""
    require_agreement(
        "target_parameters", [sorted(c.get("target_parameters") or []) for c in configs]
    )
    if configs[0].get("target_parameters"):
        sides = [experts_input_side(config) for config in configs]
        require_agreement(
            "which axis of an expert is its input (it is the second from PEFT 0.19 on)", sides
        )
