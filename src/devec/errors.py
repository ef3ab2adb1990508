"""What can go wrong, and how it is said.

Every error a user can cause is a `DevecError`: it says what was expected, what came, where, and
what to do. Context (module, file) is added on the way up by `located`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DevecError(ValueError):
    """Base class of all errors that devec raises on purpose."""


class FormatError(DevecError):
    """The input is not a readable adapter: missing, corrupt, or inconsistent in itself."""


class UnsupportedError(DevecError):
    """The input is valid but cannot be handled exactly, so it is refused by name."""


class IncompatibleError(DevecError):
    """Inputs that do not fit together, or arguments outside of their range."""


class OutputError(DevecError):
    """The result cannot be written."""


class DevecWarning(UserWarning):
    """Something the user should know, though the result is right."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix any `DevecError` raised inside with the place it concerns.

    Args:
        where: The place, e.g. ``"module 'q_proj' of 'anime'"``.

    Yields:
        Nothing.

    Raises:
        DevecError: The error raised inside, of the same class, with `where` in front.
    """
    try:
        yield
    except DevecError as error:
        raise type(error)(f"{where}: {error}") from error


def listed(names: list[str], limit: int = 5) -> str:
    """Join names for a message, at most `limit` of them, and say how many were left out."""
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
