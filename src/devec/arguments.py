"""Arguments that are numbers, of Python, of NumPy or of torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from devec.errors import IncompatibleError


def number(value: object, what: str) -> float:
    """A finite number as one of Python, which records and tensors take.

    Args:
        value: An int or float, a fraction or decimal, or a scalar of NumPy or torch.
        what: What the number is, for messages.

    Returns:
        The number, an int if it is whole by its type and else a float.

    Raises:
        IncompatibleError: If it is no number, or not finite.
    """
    value = _of_python(value)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise IncompatibleError(f"{what} must be a number, got {value!r}")
    try:
        found = float(value)
    except (OverflowError, ValueError):  # integers have no largest one, decimals a signalling NaN
        found = math.nan
    if not math.isfinite(found):
        raise IncompatibleError(f"{what} must be a finite number, got {value}")
    return int(value) if isinstance(value, Integral) else found


def inverse(value: object, what: str) -> float:
    """The inverse of a finite number.

    Args:
        value: As in `number`.
        what: What the number is, for messages.

    Returns:
        The inverse.

    Raises:
        IncompatibleError: If it is no number, not finite, or zero.
    """
    found = number(value, what)
    if not found:
        raise IncompatibleError(f"{what} must not be zero to divide by")
    return 1 / found


def whole_number(value: object, what: str) -> int:
    """A whole number as an int of Python.

    Args:
        value: An int, or an integer scalar of NumPy or torch.
        what: What the number is, for messages.

    Returns:
        The number.

    Raises:
        IncompatibleError: If it is no whole number.
    """
    value = _of_python(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise IncompatibleError(f"{what} must be a whole number, got {value!r}")
    return int(value)


def numbers(values: object, what: str) -> list[float]:
    """A sequence of finite numbers as a new list.

    Args:
        values: A list, tuple, array or other ordered collection.
        what: What they are, for messages, in the plural.

    Returns:
        The numbers.

    Raises:
        IncompatibleError: If it is no collection of numbers, or one without an order.
    """
    scalar = getattr(values, "ndim", None) == 0
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection) or scalar:
        raise IncompatibleError(f"{what} are a list of numbers, got {values!r}")
    if isinstance(values, Set):
        raise IncompatibleError(
            f"{what} are a list of numbers, one for each adapter; the order of a set is chance, "
            f"got {values!r}"
        )
    return [number(value, f"each of the {what}") for value in values]


def _of_python(value: object) -> object:
    """A scalar of NumPy or torch as a number of Python."""
    scalar: Any = value
    is_scalar = getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False)
    return scalar.item() if is_scalar else value
