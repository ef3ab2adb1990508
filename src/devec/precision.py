"""The precision that devec multiplies matrices in, whatever the caller allows for a model.

Models run under autocast, in TF32 or with products in bfloat16. Factors and base weights are
multiplied in float32 or float64: `full_precision` marks every function that does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock, local
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = tuple(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


class _Inside(local):
    """Whether this thread is inside a function that computes in full precision."""

    value = False


class _Products:
    """The settings of torch for products of float32 matrices, which are those of the process.

    Several threads share them. The first thread to need full precision sets it, and the last one to
    leave restores what was set before, unless the setting was changed meanwhile.
    """

    def __init__(self) -> None:
        """Start without users."""
        self._lock = Lock()
        self._users = 0
        self._before: _Settings | None = None
        self._during: _Settings | None = None

    def enter(self) -> None:
        """Have float32 matrices multiplied in float32."""
        with self._lock:
            self._users += 1
            if self._users == 1 and not (found := _Settings.read()).is_full:
                self._before = found
                found.make_full()
                self._during = _Settings.read()

    def leave(self) -> None:
        """Restore the settings if no other thread needs full precision."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before is not None:
                if _Settings.read() == self._during:
                    self._before.restore()
                self._before = self._during = None


class _Settings:
    """What torch allows for products of float32: in all, and by backend where it has these.

    Attributes:
        overall: ``"highest"``, ``"high"`` or ``"medium"``; None where backends differ, for which
            torch has no word.
        backends: Precision of each backend.
    """

    def __init__(self, overall: str | None, backends: tuple[str, ...]) -> None:
        """Remember the settings."""
        self.overall, self.backends = overall, backends

    @classmethod
    def read(cls) -> _Settings:
        """The settings of now."""
        backends = tuple(backend.fp32_precision for backend in _backends())
        try:
            return cls(torch.get_float32_matmul_precision(), backends)
        except RuntimeError:  # torch refuses a mixture of this and settings by backend
            return cls(None, backends)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Settings):
            return NotImplemented
        return (self.overall, self.backends) == (other.overall, other.backends)

    __hash__ = None  # type: ignore[assignment]

    @property
    def is_full(self) -> bool:
        """Whether products of float32 are computed in float32."""
        return self.overall == "highest"

    def make_full(self) -> None:
        """Have products of float32 computed in float32."""
        if self.overall is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in _backends():
            backend.fp32_precision = "ieee"

    def restore(self) -> None:
        """Make these the settings again."""
        if self.overall is not None:
            torch.set_float32_matmul_precision(self.overall)
        for backend, precision in zip(_backends(), self.backends, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    """The backends whose precision can be set one by one, which torch has since 2.9."""
    homes = (torch.backends.cuda, torch.backends.mkldnn)
    found: list[Any] = [getattr(home, "matmul", None) for home in homes]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


_PRODUCTS = _Products()
_INSIDE = _Inside()


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Compute without autocast, and products of float32 in float32.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _PRODUCTS.enter()
        stack.callback(_PRODUCTS.leave)
        _INSIDE.value = True
        stack.callback(setattr, _INSIDE, "value", False)
        yield


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function multiply matrices in the precision of its tensors.

    Args:
        function: The function; no generator, whose consumer would run in this precision, too.

    Returns:
        The function, which runs without autocast, and whose products of float32 matrices are
        computed in float32 rather than in TF32 or bfloat16.

    Cost: microseconds; nothing within another such function.
    """

    @wraps(function)
    def in_full_precision(*args: P.args, **kwargs: P.kwargs) -> R:
        if _INSIDE.value:
            return function(*args, **kwargs)
        with _in_full_precision():
            return function(*args, **kwargs)

    return in_full_precision
