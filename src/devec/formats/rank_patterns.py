"""Ranks and alphas by module name, as in PEFT's ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Config = dict[str, Any]


def rank_and_scaling(config: Config, name: str) -> tuple[int, float]:
    """The rank r that PEFT gives a module, and its scaling: alpha/r, or alpha/√r for rsLoRA."""
    rank = _first_match(config.get("rank_pattern"), name, config["r"])
    alpha = _first_match(config.get("alpha_pattern"), name, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first_match(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:  # noqa: ANN401
    """The value of the first key that matches a module name, by PEFT's rule."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def alternation(names: Sequence[str], optional: str = "") -> str:
    """A pattern that matches exactly these names; `optional` is a prefix that may be missing."""
    return f"(?:{'|'.join(_escaped(name, optional) for name in names)})"


def _escaped(name: str, optional: str) -> str:
    """A name as a pattern, with a prefix that may be missing."""
    if optional and name.startswith(optional):
        return f"(?:{re.escape(optional)})?{re.escape(name.removeprefix(optional))}"
    return re.escape(name)


def rank_pattern(
    ranks: Mapping[str, Number], optional: str = "", usual: Number | None = None
) -> tuple[Number, dict[str, Number]]:
    """The usual rank (or alpha), and patterns for the modules with others.

    Patterns are anchored, escaped and grouped, one alternation for each distinct rank: PEFT matches
    every pattern against every module.

    Args:
        ranks: Name (of a module or parameter) in the base model → rank or alpha.
        optional: A prefix of names that may be missing.
        usual: The rank that needs no pattern; by default the most frequent.

    Returns:
        The rank, and ``rank_pattern``.
    """
    common = Counter(ranks.values()).most_common(1)[0][0] if usual is None else usual
    others = sorted({rank for rank in ranks.values() if rank != common})
    named = {rank: [name for name, r in ranks.items() if r == rank] for rank in others}
    return common, {f"^{alternation(named[rank], optional)}": rank for rank in others}


Number = TypeVar("Number", int, float)
