"""Errors and warnings that devec raises, and helpers for their messages.

Every error that a user can cause is a `DevecError`. Its message says what was expected, what was
received, where, and what to do. Callers add the context (module, file) with `located`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import local
from types import FrameType, TracebackType

_PACKAGE = str(Path(__file__).parent) + os.sep


class DevecError(ValueError):
    """Base class of all errors that devec raises on purpose.

    It is a `ValueError`. The message says what was expected, what was received, in which module and
    file, and what to do.

    Example:
        >>> import devec
        >>> try:
        ...     devec.combine([], [1.0])
        ... except devec.DevecError as error:
        ...     print(error)
        combine needs one weight for each adapter; adapters: 0, weights: 1
    """


class FormatError(DevecError):
    """The input is not a readable adapter: missing, corrupt or inconsistent."""


class UnsupportedError(DevecError):
    """The input is valid but cannot be represented exactly."""


class IncompatibleError(DevecError):
    """The inputs do not fit together, or an argument is out of range."""


class OutputError(DevecError):
    """The result cannot be written."""


class DevecWarning(UserWarning):
    """The result is correct, but the user should know something about it.

    Warnings name the line that called devec. The standard library filters them.

    Example:
        >>> import warnings, devec
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", devec.DevecWarning)
        ...     # calls without warnings
    """


class located:  # noqa: N801  # entered for thousands of modules: a class is faster than a generator
    """Context manager that prefixes the message of any `DevecError` raised inside.

    Args:
        where: The prefix, e.g. ``"module 'q_proj' of 'anime'"``.

    Raises:
        DevecError: The error raised inside, of the same class, with `where` in front.
    """

    def __init__(self, where: str) -> None:
        """Store the prefix."""
        self._where = where

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Raise a `DevecError` again with the prefix."""
        if isinstance(error, DevecError):
            raise type(error)(f"{self._where}: {error}") from error


def listed(names: list[str], limit: int = 5) -> str:
    """Names joined for a message; those beyond `limit` are only counted."""
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def warn(message: str) -> None:
    """Issue a `DevecWarning` that names the user's line, which called devec."""
    if _OF_THREAD.collected is not None:
        _OF_THREAD.collected.append(message)
    else:
        warnings.warn(message, DevecWarning, stacklevel=_frames_of_devec() + 1)


class _OfThread(local):
    """The messages that the calling thread collects, if it does."""

    collected: list[str] | None = None


_OF_THREAD = _OfThread()


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the messages of `warn` in this thread, for a thread that the user's line called."""
    messages: list[str] = []
    before, _OF_THREAD.collected = _OF_THREAD.collected, messages
    try:
        yield messages
    finally:
        _OF_THREAD.collected = before


def _frames_of_devec() -> int:
    """The number of frames from the caller of this function to the outermost frame of devec."""
    # The outermost: frames of decorators and context managers may lie between frames of devec.
    frame: FrameType | None = sys._getframe(1)
    depth = outermost = 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            outermost = depth
        frame, depth = frame.f_back, depth + 1
    return outermost
