"""Validation of numeric arguments: numbers of Python, NumPy or torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from devec.errors import IncompatibleError


def number(value: object, what: str) -> float:
    """A finite number as a Python int, if its type is integral, or float; `what` is its name."""
    value = _python_scalar(value)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise IncompatibleError(f"{what} must be a number, got {value!r}")
    try:
        converted = float(value)
    except (OverflowError, ValueError):  # a huge integer, or a decimal's signalling NaN
        converted = math.nan
    if not math.isfinite(converted):
        raise IncompatibleError(f"{what} must be a finite number, got {value}")
    return int(value) if isinstance(value, Integral) else converted


def inverse(value: object, what: str) -> float:
    """The inverse of a finite number other than zero."""
    divisor = number(value, what)
    if not divisor:
        raise IncompatibleError(f"{what} must not be zero: it is a divisor")
    return 1 / divisor


def whole_number(value: object, what: str) -> int:
    """A whole number as a Python int."""
    value = _python_scalar(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise IncompatibleError(f"{what} must be a whole number, got {value!r}")
    return int(value)


def numbers(values: object, what: str) -> list[float]:
    """An ordered collection of finite numbers as a new list; `what` is its name in the plural."""
    scalar = getattr(values, "ndim", None) == 0
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection) or scalar:
        raise IncompatibleError(f"{what} must be a list of numbers, got {values!r}")
    if isinstance(values, Set):
        raise IncompatibleError(
            f"{what} must be a list of numbers, one for each adapter; a set has no order, "
            f"got {values!r}"
        )
    return [number(value, f"each of the {what}") for value in values]


def _python_scalar(value: object) -> object:
    """A scalar of NumPy or torch as a Python number; other values unchanged."""
    scalar: Any = value
    is_scalar = getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False)
    return scalar.item() if is_scalar else value
