"""Strings from files: JSON that can be written again, patterns that come to an end."""

from __future__ import annotations

import json
import re
from typing import Any

from devec.errors import FormatError

_MOST_REPETITIONS = 8


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The text.
        where: What it is, for messages.

    Returns:
        The object.

    Raises:
        FormatError: If it is not one, or holds what no file can.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no character
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} should hold a JSON object, holds {type(value).__name__}")
    return value


def require_pattern(pattern: str, where: str) -> None:
    """Check that a string is a regular expression, and one that is matched in reasonable time.

    Args:
        pattern: The string.
        where: What it is, for messages.

    Raises:
        FormatError: If it is not a pattern, or repeats what repeats or branches itself, for which
            matching can take time exponential in the length of a name.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{where} is no pattern: {error}") from error
    if _runs_away(pattern):
        raise FormatError(
            f"{where} is the pattern {pattern[:100]!r}, which repeats a group that repeats or "
            "branches itself, so that matching it could take forever; write it without"
        )


def _runs_away(pattern: str) -> bool:
    """Whether a group that repeats or branches is itself repeated, or too much is."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    restless = [False]
    for at, character in enumerate(plain):
        repeated = plain[at + 1 : at + 2] in ("*", "+", "{")
        if character == "(":
            restless.append(False)
        elif character == ")" and len(restless) > 1:
            inside = restless.pop()
            if inside and repeated:
                return True
            restless[-1] |= inside or repeated
        elif character == "|" or repeated:
            restless[-1] = True
    return len(re.findall(r"[*+{]", plain)) > _MOST_REPETITIONS
