"""The ``adapter_config.json`` of an output, and writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devec.formats.card import write_card
from devec.formats.peft.config import (
    CARRIED_FIELDS,
    CONFIG_NAME,
    TASKS_WITH_HEADS,
    TRAINING_ONLY_FIELDS,
)
from devec.formats.rank_patterns import Config, alternation, rank_pattern


def new_config(modules: Sequence[str], rank: int, alpha: float, base: str | None) -> Config:
    """A configuration for an adapter of another format, with one rank and alpha for all modules."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        **exact_targets(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def result_config(config: Config, *, carried: bool) -> Config:
    """The configuration of a result, without the fields that only hold for the input."""
    changes: Config = {field: None for field in TRAINING_ONLY_FIELDS if config.get(field)}
    if config.get("init_lora_weights", True) is not True:
        changes["init_lora_weights"] = True  # loading must not run any other
    if not carried:
        if config.get("modules_to_save") and config.get("task_type") in TASKS_WITH_HEADS:
            changes["task_type"] = None
        for field in ("modules_to_save", "trainable_token_indices", "bias"):
            if config.get(field, CARRIED_FIELDS[field]) != CARRIED_FIELDS[field]:
                changes[field] = CARRIED_FIELDS[field]
    return {**config, **changes}


def with_ranks(config: Config, ranks: Mapping[str, int], usual: int | None) -> Config:
    """A configuration with these ranks and alpha = r, so that all scalings are 1.

    Args:
        config: The input's configuration.
        ranks: Name (of a module or parameter) in the base model → rank.
        usual: The rank that must not need a pattern; by default the most frequent.

    Returns:
        The configuration.
    """
    common, pattern = rank_pattern(ranks, usual=usual)
    return {
        **config,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
    }


def with_targets(
    config: Config, modules: Sequence[str], others: Sequence[str], *, listed: bool
) -> Config:
    """A configuration that targets exactly these modules.

    PEFT matches a list against the endings of names. A plain list is exact if the inputs had plain
    lists, as every module that ends like one of theirs was a target, and if no missing module ends
    like a target of the result. Otherwise, names that only end alike are excluded.

    Args:
        config: The input's configuration.
        modules: Names of the modules to target, without parameters.
        others: Names of modules that the inputs target and the result lacks.
        listed: Whether all inputs name their modules by plain lists.

    Returns:
        The configuration.
    """
    changes: Config = {"target_modules": list(modules)}
    if not modules:
        wanted = config.get("target_modules")
        changes["target_modules"] = [] if others or isinstance(wanted, list) else wanted
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(field) is not None:
            changes[field] = None
    if config.get("ensure_weight_tying") and not config.get("modules_to_save"):
        changes["ensure_weight_tying"] = False
    if modules and not (listed and not _endings(modules, others)):
        changes |= exact_targets(modules)
    return {**config, **changes}


def is_plain_list(config: Config) -> bool:
    """Whether a configuration names its modules by a list alone."""
    fields = ("exclude_modules", "layers_to_transform", "ensure_weight_tying")
    narrowed = any(config.get(field) for field in fields)
    return isinstance(config.get("target_modules"), list) and not narrowed


def exact_targets(modules: Sequence[str]) -> Config:
    """The fields that make PEFT adapt exactly the modules with these names in the base model.

    They are a list of full names: in models whose experts transformers 5 stores differently, PEFT
    widens a pattern to the last parts of the names that it matches, but no list. A list also
    matches names that only end like one of these, so such names are excluded. The module that
    contains the first one is excluded, too, because PEFT warns if nothing is.

    Args:
        modules: The names.

    Returns:
        The fields.
    """
    names = set(modules)
    parents = (name.rpartition(".")[0] for name in modules)
    parent = next((name for name in parents if name and name not in names), "")
    longer = sorted(_endings(modules, modules))
    but = f"(?!{alternation(longer)}$)" if longer else ""
    excluded = f"{but}.+\\.{alternation(modules)}"
    if parent:
        excluded = f"{re.escape(parent)}|{excluded}"
    return {"target_modules": list(modules), "exclude_modules": excluded}


def _endings(modules: Sequence[str], others: Sequence[str]) -> set[str]:
    """The other names that end like the name of a module, and are longer."""
    names = set(modules)
    longer = set()
    for other in others:
        parts = other.split(".")
        if any(".".join(parts[start:]) in names for start in range(1, len(parts))):
            longer.add(other)
    return longer


def write_beside(
    name: str, config: Config, provenance: Mapping[str, Any] | None, directory: Path
) -> None:
    """Write the configuration, the model card and the provenance record to a directory."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
    write_card(directory, name, config, provenance)
