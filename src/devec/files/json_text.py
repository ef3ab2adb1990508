"""Checked strings from files: JSON objects, and regular expressions that are safe to match."""

from __future__ import annotations

import json
import re
from typing import Any

from devec.errors import FormatError

_MAX_REPETITIONS = 8


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that can be written again; `where` names its source in messages."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates cannot be encoded
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} should hold a JSON object, holds {type(value).__name__}")
    return value


def require_pattern(pattern: str, where: str) -> None:
    """Refuse a string that is no regular expression, or one with exponential matching time."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{where} is no pattern: {error}") from error
    if _may_backtrack(pattern):
        raise FormatError(
            f"{where} is the pattern {pattern[:100]!r}, which repeats a group that repeats or "
            "branches itself, so matching it could take forever; write it without"
        )


def _may_backtrack(pattern: str) -> bool:
    """Whether a group that repeats or branches is itself repeated, or too many items are."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    varies = [False]  # for each open group, whether it repeats or branches
    for index, character in enumerate(plain):
        repeated = plain[index + 1 : index + 2] in ("*", "+", "{")
        if character == "(":
            varies.append(False)
        elif character == ")" and len(varies) > 1:
            inside = varies.pop()
            if inside and repeated:
                return True
            varies[-1] |= inside or repeated
        elif character == "|" or repeated:
            varies[-1] = True
    return len(re.findall(r"[*+{]", plain)) > _MAX_REPETITIONS
