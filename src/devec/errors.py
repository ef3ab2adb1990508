"""What can go wrong, and how it is said.

Every error a user can cause is a `DevecError`: it says what was expected, what came, where, and
what to do. Context (module, file) is added on the way up by `located`.
"""

from __future__ import annotations

from types import TracebackType


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


class located:  # noqa: N801  # a context that thousands of modules enter: no generator
    """Prefix any `DevecError` raised inside with the place it concerns.

    Args:
        where: The place, e.g. ``"module 'q_proj' of 'anime'"``.

    Raises:
        DevecError: The error raised inside, of the same class, with `where` in front.
    """

    def __init__(self, where: str) -> None:
        """Remember the place."""
        self._where = where

    def __enter__(self) -> None:
        """Nothing is to be done yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Say the place if it is an error of devec's."""
        if isinstance(error, DevecError):
            raise type(error)(f"{self._where}: {error}") from error


def listed(names: list[str], limit: int = 5) -> str:
    """Join names for a message, at most `limit` of them, and say how many were left out."""
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
